//! What is measured, and what is made of it.

use super::*;

fn options(quotas: &[&str], workers: &[u32]) -> Options {
    Options {
        store: "store".into(),
        model: "m".into(),
        layers: 6,
        context: 4096,
        quotas: quotas.iter().map(|quota| Quota::parse(quota).unwrap()).collect(),
        workers: workers.to_vec(),
        forms: vec![Form::Replicas, Form::Pipeline],
        sequences: 32,
        generate: 256,
        prompts: 4,
        prompt: 512,
        rounds: 1,
        warm_up: Duration::ZERO,
        window: Duration::from_secs(1),
        threads: 1,
        memory_bytes: 1 << 30,
        isa: None,
        etcd: None,
    }
}

fn named(options: &Options) -> Vec<String> {
    options.series().1.iter().map(Series::what).collect()
}

#[test]
fn each_kind_of_worker_is_measured_alone_once() {
    assert_eq!(
        named(&options(&["0.5", "0.5", "0.5"], &[2, 3])),
        ["worker 1 alone", "2 replicas", "a pipeline of 2", "3 replicas", "a pipeline of 3"]
    );
    assert_eq!(
        named(&options(&["0.2", "0.4", "0.2"], &[3])),
        ["worker 1 alone", "worker 2 alone", "3 replicas", "a pipeline of 3"]
    );
    assert_eq!(named(&options(&[], &[1])), ["worker 1 alone"]);
}

#[test]
fn a_share_is_of_what_its_workers_give_alone() {
    let options = options(&["0.2", "0.4", "0.2"], &[2, 3]);
    let (alone, mut all) = options.series();
    assert_eq!(alone, 2);
    // Decode and prefill of each series, in order.
    let rates =
        [(10.0, 100.0), (20.0, 200.0), (27.0, 270.0), (24.0, 285.0), (38.0, 380.0), (30.0, 400.0)];
    for (series, (decode, prefill)) in all.iter_mut().zip(rates) {
        for (rounds, tokens_per_s) in series.rounds.iter_mut().zip([decode, prefill]) {
            rounds.push(Observed { tokens_per_s, ..Observed::default() });
        }
    }
    let measured = assemble(&options, alone, &all);
    let shares: Vec<_> =
        measured.together.iter().map(|a| (a.decode.share, a.prefill.share)).collect();
    assert_eq!(shares, [(0.9, 0.9), (0.8, 0.95), (0.95, 0.95), (0.75, 1.0)]);
    assert_eq!(measured.together[2].decode.sum_tokens_per_s, 40.0);
    assert!(measured.alone.iter().all(|one| one.decode.share == 1.0 && one.workers.len() == 1));
}

#[test]
fn what_makes_no_sense_is_refused() {
    options(&[], &[6]).check().unwrap();
    options(&["0.5", "0.2"], &[1]).check().unwrap();
    let refused = |options: Options| options.check().unwrap_err().to_string();
    assert_eq!(refused(options(&["0.5"], &[2])), "1 quotas for 2 workers");
    assert!(refused(options(&[], &[7])).contains("7 stages need as many layers"));
    Options { forms: vec![Form::Replicas], ..options(&[], &[7]) }.check().unwrap();
    assert!(refused(Options { prompt: 4096, ..options(&[], &[2]) }).contains("4097 tokens"));
    let hour = Duration::from_secs(3601);
    assert!(refused(Options { window: Duration::ZERO, ..options(&[], &[2]) }).contains("from 1s"));
    assert!(refused(Options { warm_up: hour, ..options(&[], &[2]) }).contains("the warm-up is"));
    assert!(refused(Options { sequences: 129, ..options(&[], &[2]) }).contains("258 requests"));
}
