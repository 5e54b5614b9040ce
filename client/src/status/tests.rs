//! The table for people.

use proto::status::{ModelStatus, RateStatus, StageStatus};

use super::*;

fn sample() -> ClusterStatus {
    let worker = |id: &str, state: &str, detail: &str| WorkerStatus {
        id: id.into(),
        address: "127.0.0.1:7071".into(),
        incarnation: "0123456789abcdef0123456789abcdef".into(),
        state: state.into(),
        isa: "avx2".into(),
        threads: 2,
        memory_bytes: 3 << 29,
        detail: detail.into(),
        rack: String::new(),
    };
    let stage = StageStatus {
        worker: "w1".into(),
        address: "127.0.0.1:7071".into(),
        layers: [0, 6],
        compute_ms: 1.234,
        predicted_busy: 0.987,
        predicted_tokens_per_s: 99.96,
        ..StageStatus::default()
    };
    ClusterStatus {
        waiting: None,
        admin: None,
        cluster: "rack".into(),
        cluster_id: "c".into(),
        term: 12,
        class: "fedcba98765432100123456789abcdef".into(),
        ready: true,
        version: "0.1.0".into(),
        model: ModelStatus {
            name: "tiny".into(),
            id: "00112233445566778899".into(),
            layers: 6,
            context: 512,
            has_tokenizer: false,
            ..ModelStatus::default()
        },
        workers: vec![worker("w1", "active", ""), worker("worker-2", "standby", "came late")],
        plan: PlanStatus {
            pipelines: vec![PipelineStatus {
                id: 1,
                epoch: 9,
                state: "active".into(),
                stages: vec![stage],
                predicted_tokens_per_s: 99.6,
                ..PipelineStatus::default()
            }],
            reason: "one worker holds it all".into(),
        },
        queue: QueueStatus {
            running: 1,
            waiting: 2,
            waiting_limit: 64,
            waiting_tokens: 0,
            waiting_tokens_limit: 1000,
            kv_blocks_total: 100,
            kv_blocks_used: 7,
        },
        rates: RateStatus {
            prompt_tokens_per_s: 10.0,
            generated_tokens_per_s: 20.04,
            requests_finished: 3,
            requests_failed: 0,
            ..RateStatus::default()
        },
    }
}

#[test]
fn defaults_of_sampling_are_shown_where_there_are_any() {
    let mut status = sample();
    let lines = |status: &ClusterStatus| {
        let text = table(status);
        text.lines()
            .filter(|line| line.starts_with("sampling"))
            .map(str::to_owned)
            .collect::<Vec<_>>()
    };
    assert_eq!(lines(&status), Vec::<String>::new());
    status.model.sampling.temperature = Some(0.7);
    status.model.sampling.top_k = Some(20);
    let want = "sampling temperature 0.7, top_k 20, unless a request says otherwise";
    assert_eq!(lines(&status), [want]);
    let json = serde_json::to_string(&status).unwrap();
    assert!(json.contains(r#""sampling":{"temperature":0.7,"top_k":20}"#), "{json}");
}

#[test]
fn the_table_is_this() {
    let want = "\
cluster  rack (ready), term 12
model    tiny (001122334455), 6 layers, context 512, no tokenizer
class    fedcba987654
queue    1 running, 2 of 64 waiting, 7 of 100 KV blocks in use
rates    prompt 10.0 tokens/s, generated 20.0 tokens/s; 3 requests finished, 0 failed

WORKER    ADDRESS         ISA   THREADS  MEMORY   INCARNATION   STATE
w1        127.0.0.1:7071  avx2  2        1.5 GiB  0123456789ab  active
worker-2  127.0.0.1:7071  avx2  2        1.5 GiB  0123456789ab  standby (came late)

pipeline 1, epoch 9: active, predicted 100 tokens/s
STAGE  WORKER  ADDRESS         LAYERS  PREDICTED       BUSY  COMPUTE  WAIT
0      w1      127.0.0.1:7071  0..6    100.0 tokens/s  99 %  1.23 ms  0.00 ms

plan: one worker holds it all
";
    assert_eq!(table(&sample()), want);
}

#[test]
fn how_steps_are_sized_is_told_with_what_it_was_derived_from() {
    let mut status = sample();
    status.queue.waiting_tokens = 512;
    status.plan.pipelines[0].budget = StepBudget {
        target_ms: 200.0,
        chunk_tokens: 64,
        chunk_tokens_last: 24,
        step_ms: 1.5,
        token_ms: 2.25,
        scale: 1.1,
        context_ms: 0.75,
    };
    let text = table(&status);
    assert!(text.contains("2 of 64 waiting (512 tokens), 7 of"), "{text}");
    let want = "steps read 64 tokens of a prompt, 24 at the end of the context: 200 ms of \
                (1.50 ms + 2.25 ms a token) x 1.10, and 0.750 ms a token for each 1000 before it\n";
    assert!(text.contains(want), "{text}");
    // Nobody measured.
    status.plan.pipelines[0].budget.token_ms = 0.0;
    assert!(table(&status).contains("at the end of the context: 200 ms\n"));
}

#[test]
fn racks_have_a_column_where_any_is_known() {
    let mut status = sample();
    status.workers[1].rack = "~w1".into();
    let text = table(&status);
    let lines: Vec<_> = text.lines().skip(6).take(3).collect();
    let want = [
        "WORKER    ADDRESS         RACK  ISA   THREADS  MEMORY   INCARNATION   STATE",
        "w1        127.0.0.1:7071        avx2  2        1.5 GiB  0123456789ab  active",
        "worker-2  127.0.0.1:7071  ~w1   avx2  2        1.5 GiB  0123456789ab  standby (came late)",
    ];
    assert_eq!(lines, want);
}

#[test]
fn an_empty_cluster_has_a_table_too() {
    let text = table(&ClusterStatus::default());
    assert!(text.contains("(not ready)") && text.contains("no workers"), "{text}");
}

#[test]
fn the_json_is_the_status_itself() {
    let mut bytes = Vec::new();
    TextWriter::new(&mut bytes, true).json(&sample()).unwrap();
    let read: ClusterStatus = serde_json::from_slice(&bytes).unwrap();
    assert_eq!(read, sample());
}

#[test]
fn sizes_are_short() {
    for (count, want) in [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1 << 50, "1024.0 TiB")]
    {
        assert_eq!(bytes(count), want);
    }
}

#[test]
fn what_is_waited_for_is_said_once() {
    let detail = "no worker can serve this model".to_owned();
    let plan = proto::status::PlanStatus { reason: detail.clone(), ..Default::default() };
    let cause = proto::status::WaitCause::Workers;
    let waiting = Some(proto::status::Waiting { cause, detail: detail.clone() });
    let text = table(&ClusterStatus { plan, waiting, ..ClusterStatus::default() });
    assert!(text.contains(&format!("waiting  {detail}\n")), "{text}");
    assert_eq!(text.matches(&detail).count(), 1, "{text}");
}

#[test]
fn the_plan_in_force_is_its_pipelines_their_sum_and_the_reason() {
    let mut plan = sample().plan;
    plan.pipelines.push(PipelineStatus { id: 2, ..plan.pipelines[0].clone() });
    let text = plan_table(&plan);
    assert!(text.contains("pipeline 1, epoch 9: active, predicted 100 tokens/s"), "{text}");
    assert!(text.contains("pipeline 2, epoch 9"), "{text}");
    let end = "predicted 199.2 tokens/s in all\nplan: one worker holds it all\n";
    assert!(text.ends_with(end), "{text}");
    let none = plan_table(&PlanStatus { reason: "no worker came".into(), ..PlanStatus::default() });
    assert!(none.contains("no pipelines") && none.contains("no worker came"), "{none}");
}

#[tokio::test]
async fn who_watches_hears_why_nobody_answers_and_goes_on() {
    let unreachable = || ClientError::Unreachable {
        endpoint: "c:1".parse().expect("an endpoint"),
        why: "gone".to_owned(),
    };
    let args = StatusArgs { json: true, watch: Some(0) };
    let (mut asked, mut said, mut bytes) = (0, Vec::new(), Vec::new());
    let ask = async || {
        asked += 1;
        if asked % 2 == 0 { Err(unreachable()) } else { Ok(sample()) }
    };
    let say = |reason: &str| {
        said.push(reason.to_owned());
        if said.len() == 2 { Err(io::Error::other("enough")) } else { Ok(()) }
    };
    let end = show(ask, &args, &mut TextWriter::new(&mut bytes, false), say).await;
    assert!(matches!(end, Err(CommandError::Output(_))), "{end:?}");
    assert_eq!((bytes.iter().filter(|&&byte| byte == b'\n').count(), said.len()), (2, 2));
    assert!(said[0].contains("no coordinator answers at c:1: gone"), "{said:?}");

    let never = async || Err(unreachable());
    let end = show(never, &args, &mut TextWriter::new(Vec::new(), false), |_| Ok(())).await;
    assert!(matches!(end, Err(CommandError::Client(_))), "it may not be where it was looked for");
}
