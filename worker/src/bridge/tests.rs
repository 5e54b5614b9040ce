//! The door under a machine that does what each test needs.

use bytes::Bytes;
use proto::ids::{Epoch, Incarnation, PipelineId, StepId, Term};
use proto::step::StepHeader;

use super::*;

struct Machine<F>(F);

impl<F: FnMut(&Step, bool) + Send + 'static> Compute for Machine<F> {
    fn compute(&mut self, step: Step, expired: bool) -> Result<Executed, EngineError> {
        (self.0)(&step, expired);
        Ok(Executed { step, values: Vec::new(), filled_blocks: 0 })
    }
}

fn step(number: u64) -> Step {
    Step {
        header: StepHeader {
            pipeline: PipelineId(1),
            epoch: Epoch(1),
            term: Term(1),
            dst_incarnation: Incarnation([0; 16]),
            step: StepId(number),
            acked_step: StepId(0),
            deadline_remaining: Duration::ZERO,
        },
        rows: Vec::new(),
        ended_sequences: Vec::new(),
        stage_times: Vec::new(),
        activations: Bytes::new(),
    }
}

fn job(number: u64, reply: &mpsc::Sender<Outcome>, time_left: Duration) -> Job {
    let arrived = Instant::now();
    Job {
        step: step(number),
        arrived,
        deadline: arrived + time_left,
        spans: Vec::new(),
        reply: reply.clone(),
    }
}

const LONG: Duration = Duration::from_secs(600);

#[tokio::test]
async fn jobs_are_run_in_order_and_the_late_ones_are_marked() {
    let (failures, _) = mpsc::channel(1);
    let (reply, mut outcomes) = mpsc::channel(4);
    let (seen, mut expired) = mpsc::channel(4);
    let machine = Machine(move |_: &Step, expired: bool| seen.try_send(expired).unwrap());
    let engine = EngineHandle::start(machine, failures).unwrap();
    engine.submit(job(1, &reply, LONG)).unwrap();
    engine.submit(job(2, &reply, Duration::ZERO)).unwrap();
    engine.submit(job(3, &reply, LONG)).unwrap();
    for number in 1..=3 {
        let outcome = outcomes.recv().await.unwrap();
        assert_eq!(outcome.executed.step.header.step, StepId(number));
        assert_eq!(expired.recv().await, Some(number == 2));
    }
}

#[tokio::test]
async fn what_a_job_waits_for_others_is_told_apart_from_waking_up() {
    let (failures, _) = mpsc::channel(1);
    let (go, gate) = std::sync::mpsc::channel::<()>();
    let engine = EngineHandle::start(Machine(move |_: &Step, _| gate.recv().unwrap()), failures);
    let engine = engine.unwrap();
    let (reply, mut outcomes) = mpsc::channel(4);
    engine.submit(job(1, &reply, LONG)).unwrap();
    // It is submitted later than it arrived: of that nobody was computing.
    let late = job(2, &reply, LONG);
    let arrived = late.arrived;
    go.send(()).unwrap();
    assert_eq!(outcomes.recv().await.unwrap().behind, Duration::ZERO, "the first waits for nobody");
    let first_is_done = Instant::now();
    engine.submit(late).unwrap();
    let third = job(3, &reply, LONG);
    go.send(()).unwrap();
    let second = outcomes.recv().await.unwrap();
    assert!(second.behind > Duration::ZERO && second.behind <= first_is_done - arrived);
    assert!(second.behind <= second.wait);
    // Behind the second one for all of the time that that took.
    engine.submit(third).unwrap();
    go.send(()).unwrap();
    assert!(outcomes.recv().await.unwrap().behind > Duration::ZERO);
}

#[tokio::test]
async fn a_panic_is_reported_and_nobody_waits_for_ever() {
    let (failures, mut failed) = mpsc::channel(1);
    let (reply, mut outcomes) = mpsc::channel(4);
    let engine =
        EngineHandle::start(Machine(|_: &Step, _| panic!("blocks of {}", "lead")), failures)
            .unwrap();
    engine.submit(job(1, &reply, LONG)).unwrap();
    engine.submit(job(2, &reply, LONG)).unwrap();
    drop(reply);
    let failure = failed.recv().await.unwrap();
    assert_eq!(failure.to_string(), "the engine's thread panicked: blocks of lead");
    assert!(outcomes.recv().await.is_none(), "both jobs were dropped");
    engine.jobs.closed().await;
    let (reply, _outcomes) = mpsc::channel(1);
    assert_eq!(engine.submit(job(3, &reply, LONG)), Err(SubmitError::Stopped));
}

#[tokio::test]
async fn a_full_queue_refuses_and_retired_jobs_are_passed_over() {
    let (failures, _) = mpsc::channel(1);
    let (go, gate) = std::sync::mpsc::channel::<()>();
    let (seen, mut steps) = mpsc::channel(8);
    let machine = Machine(move |step: &Step, _| {
        seen.try_send(step.header.step).unwrap();
        gate.recv().unwrap();
    });
    let engine = EngineHandle::start(machine, failures).unwrap();
    let (reply, outcomes) = mpsc::channel(4);
    engine.submit(job(1, &reply, LONG)).unwrap();
    assert_eq!(steps.recv().await, Some(StepId(1)), "it is being computed");
    for number in 0..JOBS_MAX as u64 {
        engine.submit(job(2 + number, &reply, LONG)).unwrap();
    }
    assert_eq!(engine.submit(job(0, &reply, LONG)), Err(SubmitError::Full));
    drop(outcomes);
    go.send(()).unwrap();
    drop((engine, go));
    assert_eq!(steps.recv().await, None, "nobody waited for the others");
}

#[tokio::test]
async fn a_refusal_to_compute_is_reported_and_nothing_leaves() {
    struct Refuses;
    impl Compute for Refuses {
        fn compute(&mut self, _: Step, _: bool) -> Result<Executed, EngineError> {
            Err(EngineError::Restless)
        }
    }
    let (failures, mut failed) = mpsc::channel(1);
    let (reply, mut outcomes) = mpsc::channel(4);
    let engine = EngineHandle::start(Refuses, failures).unwrap();
    engine.submit(job(1, &reply, LONG)).unwrap();
    engine.submit(job(2, &reply, LONG)).unwrap();
    drop(reply);
    let failure = failed.recv().await.unwrap();
    assert!(matches!(failure, EngineFailure::Refused(EngineError::Restless)), "{failure}");
    assert!(outcomes.recv().await.is_none(), "both jobs were dropped");
}

#[tokio::test]
async fn memory_is_given_back_when_the_last_step_is_done() {
    let reserve = crate::reserve::Reserve::new(10);
    let charge = Arc::new(reserve.take(10, 0).await.unwrap());
    let (failures, _) = mpsc::channel(1);
    let (reply, _outcomes) = mpsc::channel(4);
    let (go_on, wait) = std::sync::mpsc::channel::<()>();
    let (began, mut begun) = mpsc::channel(1);
    let machine = Machine(move |_: &Step, _| {
        began.try_send(()).unwrap();
        wait.recv().unwrap();
    });
    let engine = EngineHandle::start_charged(machine, Some(charge), failures).unwrap();
    engine.submit(job(1, &reply, LONG)).unwrap();
    begun.recv().await.unwrap();
    drop(engine);
    assert_eq!(reserve.used_bytes(), 10, "it still computes");
    go_on.send(()).unwrap();
    reserve.is_free().await;
}
