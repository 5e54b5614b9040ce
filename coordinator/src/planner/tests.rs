//! What every deployment promises, against brute force and by cases.

use std::time::Duration;

use proptest::prelude::*;

use super::*;

mod brute;
mod many;

const MS: u64 = 1_000_000;

/// Times on a line for 1 to `rows` rows: `layer_ns` for one row, a tenth of it more for each.
fn steps(rows: u32, layer_ns: u64, head_ns: u64) -> Vec<StepTime> {
    let of = |ns: u64, rows: u32| ns + ns / 10 * u64::from(rows - 1);
    (1..=rows)
        .map(|rows| StepTime { rows, layer_ns: of(layer_ns, rows), head_ns: of(head_ns, rows) })
        .collect()
}

fn worker(id: &str, memory_bytes: u64, layer_ns: u64, head_ns: u64) -> WorkerSpec {
    WorkerSpec {
        id: id.to_owned(),
        machine: String::new(),
        rack: String::new(),
        memory_bytes,
        steps: steps(16, layer_ns, head_ns),
    }
}

/// A model of 100 bytes a layer, whose KV block takes one byte in each.
fn model(layers: u32) -> ModelCosts {
    ModelCosts {
        layers,
        layer_bytes: 100,
        embedding_bytes: 50,
        head_bytes: 60,
        tied_head: false,
        kv_block_layer_bytes: 1,
    }
}

fn options() -> Options {
    Options { min_kv_blocks: 4, max_kv_blocks: 1000, context_tokens: 128, ..Options::default() }
}

fn problem(layers: u32, workers: Vec<WorkerSpec>) -> Problem {
    Problem { model: model(layers), workers, options: options() }
}

/// What every deployment promises: each layer once and in order, no worker twice, memory, time and
/// rate as said, everybody in a pipeline or left out for a reason.
fn check(problem: &Problem, found: &Deployment) {
    let mut seen = Vec::new();
    let mut total = 0.0;
    for pipeline in &found.pipelines {
        let mut next = 0;
        let mut cut = Vec::new();
        for stage in &pipeline.stages {
            assert_eq!(stage.layers.start, next, "{found:#?}");
            assert!(stage.layers.end > next, "{found:#?}");
            next = stage.layers.end;
            assert!(!seen.contains(&stage.worker), "{found:#?}");
            seen.push(stage.worker.clone());
            let spec = problem.workers.iter().find(|w| w.id == stage.worker).unwrap();
            cut.push((spec, stage.layers.end - stage.layers.start));
        }
        assert_eq!(next, problem.model.layers, "{found:#?}");
        let blocks = brute::blocks(problem, &cut).expect("every stage fits");
        assert!(pipeline.kv_blocks <= blocks, "{} > {blocks}: {found:#?}", pipeline.kv_blocks);
        assert!(pipeline.kv_blocks >= problem.options.min_kv_blocks, "{found:#?}");
        let judged = brute::judge(problem, &cut, pipeline.kv_blocks).expect("the bound is kept");
        let error = (judged.tokens_per_s - pipeline.predicted_tokens_per_s).abs();
        assert!(error < 1e-6 * judged.tokens_per_s, "{judged:?}: {found:#?}");
        if let Objective::Throughput { token_time: Some(limit) } = problem.options.objective {
            assert!(u128::from(pipeline.token_ns) <= limit.as_nanos(), "{found:#?}");
        }
        if let Some(stages) = problem.options.stages {
            assert_eq!(pipeline.stages.len(), stages as usize, "{found:#?}");
        }
        total += pipeline.predicted_tokens_per_s;
    }
    assert!((total - found.tokens_per_s).abs() < 1e-6 * total, "{found:#?}");
    if let Some(pipelines) = problem.options.pipelines {
        assert_eq!(found.pipelines.len(), pipelines as usize, "{found:#?}");
    }
    assert_eq!(seen.len(), found.workers.len(), "{found:#?}");
    assert!(found.workers.iter().all(|w| w.busy > 0.0 && w.busy <= 1.0 + 1e-9), "{found:#?}");
    seen.extend(found.left_out.iter().map(|left_out| left_out.worker.clone()));
    assert!(found.left_out.iter().all(|left_out| !left_out.reason.is_empty()));
    seen.sort();
    let mut all: Vec<_> = problem.workers.iter().map(|w| w.id.clone()).collect();
    all.sort();
    assert_eq!(seen, all, "{found:#?}");
}

fn arb_workers(count: std::ops::RangeInclusive<usize>) -> impl Strategy<Value = Vec<WorkerSpec>> {
    let one = (150u64..1500, 1u64..20, 0u64..60, 0u8..3, 0u8..3, 2u32..9);
    proptest::collection::vec(one, count).prop_map(|all| {
        let named = all.into_iter().enumerate();
        named
            .map(|(i, (memory, layer, head, machine, rack, rows))| WorkerSpec {
                machine: format!("m{machine}"),
                rack: format!("r{rack}"),
                steps: steps(rows, layer * MS / 2, head * MS / 2),
                ..worker(&format!("w{i}"), memory, 1, 1)
            })
            .collect()
    })
}

fn arb_model() -> impl Strategy<Value = ModelCosts> {
    (1u32..7, 20u64..150, 0u64..200, 0u64..200, any::<bool>(), 1u64..6).prop_map(
        |(layers, layer_bytes, embedding_bytes, head_bytes, tied_head, kv_block_layer_bytes)| {
            ModelCosts {
                layers,
                layer_bytes,
                embedding_bytes,
                head_bytes,
                tied_head,
                kv_block_layer_bytes,
            }
        },
    )
}

fn arb_options() -> impl Strategy<Value = Options> {
    let objective = prop_oneof![
        2 => Just(Objective::default()),
        1 => (20u64..600).prop_map(|ms| Objective::Throughput {
            token_time: Some(Duration::from_millis(ms)),
        }),
        1 => Just(Objective::Latency),
    ];
    let few = || prop_oneof![3 => Just(None), 1 => (1u32..4).prop_map(Some)];
    (few(), few(), 1u32..6, 6u32..100, 20u32..400, objective).prop_map(
        |(stages, pipelines, min_kv_blocks, max_kv_blocks, context_tokens, objective)| Options {
            stages,
            // More are as quick as can be had, not within a hundredth of the quickest.
            pipelines: pipelines.filter(|&few| few == 1 || objective != Objective::Latency),
            min_kv_blocks,
            max_kv_blocks,
            context_tokens,
            objective,
            incumbent: Vec::new(),
        },
    )
}

fn arb_problem(workers: std::ops::RangeInclusive<usize>) -> impl Strategy<Value = Problem> {
    (arb_model(), arb_workers(workers), arb_options())
        .prop_map(|(model, workers, options)| Problem { model, workers, options })
}

/// Compares with brute force: at most a hundredth less.
fn check_best(problem: &Problem) {
    match (deploy(problem), brute::best(problem)) {
        (Ok(found), Some((most, least_ns))) => {
            check(problem, &found);
            assert!(
                found.tokens_per_s >= 0.99 * most,
                "{} of {most} tokens/s\n{problem:#?}\n{found:#?}",
                found.tokens_per_s
            );
            if problem.options.objective == Objective::Latency {
                for pipeline in &found.pipelines {
                    let cut: Vec<_> = pipeline
                        .stages
                        .iter()
                        .map(|stage| {
                            let spec = problem.workers.iter().find(|w| w.id == stage.worker);
                            (spec.unwrap(), stage.layers.end - stage.layers.start)
                        })
                        .collect();
                    let judged = brute::judge(problem, &cut, pipeline.kv_blocks).unwrap();
                    assert!(judged.single_ns <= least_ns + least_ns / 100, "{found:#?}");
                }
            }
        }
        (Err(_), None) => {}
        (found, want) => panic!("{found:#?}\n{want:?}\n{problem:#?}"),
    }
}

/// How many times as many cases as usual: 256 of `PROPTEST_CASES` are once.
fn soak() -> u32 {
    (ProptestConfig::default().cases / 256).max(1)
}

/// So many cases, more if there is time.
fn cases(usual: u32) -> ProptestConfig {
    ProptestConfig::with_cases(usual * soak())
}

proptest! {
    #![proptest_config(cases(200))]

    #[test]
    fn the_order_of_workers_changes_nothing_and_promises_are_kept(problem in arb_problem(2..=5)) {
        let mut turned = problem.clone();
        turned.workers.rotate_left(1);
        turned.workers.swap(0, 1);
        let found = deploy(&problem);
        if let Ok(found) = &found {
            check(&problem, found);
        }
        prop_assert_eq!(found, deploy(&turned));
    }

    #[test]
    fn what_was_planned_stays_as_it_is_when_it_is_planned_again(problem in arb_problem(1..=6)) {
        let Ok(found) = deploy(&problem) else { return Ok(()) };
        let mut again = problem.clone();
        again.options.incumbent = incumbents(&found);
        let second = deploy(&again).unwrap();
        check(&again, &second);
        prop_assert_eq!(second.layers_moved, 0);
        prop_assert_eq!(incumbents(&second), incumbents(&found));
        let named = |who: &[Prediction]| {
            let mut named: Vec<_> = who.iter().map(|p| (p.worker.clone(), p.layers.clone())).collect();
            named.sort_by(|a, b| a.0.cmp(&b.0));
            named
        };
        prop_assert_eq!(named(&second.incumbent_workers), named(&found.workers));
        let error = (second.incumbent_tokens_per_s - found.tokens_per_s).abs();
        prop_assert!(error < 1e-6 * found.tokens_per_s, "{second:#?}");
    }

    #[test]
    fn a_plan_after_somebody_went_is_good_and_moves_few_layers(
        problem in arb_problem(2..=6),
        gone in any::<prop::sample::Index>(),
    ) {
        let Ok(found) = deploy(&problem) else { return Ok(()) };
        let mut after = problem.clone();
        after.workers.remove(gone.index(problem.workers.len()));
        let fresh = deploy(&after);
        after.options.incumbent = incumbents(&found);
        let Ok(next) = deploy(&after) else {
            prop_assert!(fresh.is_err());
            return Ok(());
        };
        check(&after, &next);
        // As good as a plan that knows of nothing, but for what is kept.
        let fresh = fresh.unwrap();
        prop_assert!(next.tokens_per_s >= 0.949 * fresh.tokens_per_s, "{next:#?} {fresh:#?}");
        let held: Vec<_> = found.pipelines.iter().flat_map(|pipeline| &pipeline.stages).collect();
        let stay = |stage: &Stage| {
            let same = held.iter().filter(|held| held.worker == stage.worker);
            same.map(|held| held.layers.clone().filter(|layer| stage.layers.contains(layer)).count())
                .sum::<usize>()
        };
        let stages = || fresh.pipelines.iter().flat_map(|pipeline| &pipeline.stages);
        let layers = problem.model.layers as usize * fresh.pipelines.len();
        let moved = layers - stages().map(stay).sum::<usize>();
        if next.tokens_per_s <= fresh.tokens_per_s * (1.0 + 1e-9) {
            prop_assert!(next.layers_moved as usize <= moved, "{moved} {next:#?} {fresh:#?}");
        }
    }
}

proptest! {
    #![proptest_config(cases(1500))]

    #[test]
    fn a_deployment_is_as_good_as_brute_force(problem in arb_problem(1..=5)) {
        check_best(&problem);
    }
}

proptest! {
    #![proptest_config(cases(20))]

    #[test]
    fn every_partition_is_as_good_as_brute_force_of_six(problem in arb_problem(6..=6)) {
        check_best(&problem);
    }
}

#[test]
fn workers_that_hold_the_whole_model_are_replicas() {
    let workers = ["a", "b", "c"].map(|id| worker(id, 1_000_000, MS, 2 * MS));
    let problem = problem(30, workers.into());
    let found = deploy(&problem).unwrap();
    check(&problem, &found);
    assert_eq!(found.pipelines.len(), 3);
    assert!(found.reason.starts_with("3 replicas on 3 of 3 workers"), "{}", found.reason);
}

#[test]
fn workers_whose_memory_is_short_share_the_model() {
    let workers = ["a", "b", "c", "d"].map(|id| worker(id, 2_900, MS, 0));
    let mut problem = problem(30, workers.into());
    problem.options.context_tokens = 32;
    let found = deploy(&problem).unwrap();
    check(&problem, &found);
    let [one, two] = &found.pipelines[..] else { panic!("{found:#?}") };
    assert_eq!((one.stages.len(), two.stages.len()), (2, 2));
    assert_eq!(one.stages[0].layers, 0..15);
}

#[test]
fn as_many_pipelines_as_are_wanted_are_as_quick_as_can_be_had() {
    let workers = [("a", MS), ("b", MS * 3 / 2), ("c", 4 * MS)];
    let mut problem = problem(
        10,
        workers.iter().map(|&(id, layer_ns)| worker(id, 1_000_000, layer_ns, MS)).collect(),
    );
    problem.options.objective = Objective::Latency;
    let found = deploy(&problem).unwrap();
    assert_eq!(found.pipelines.len(), 1, "{found:#?}");
    problem.options.pipelines = Some(2);
    let found = deploy(&problem).unwrap();
    check(&problem, &found);
    assert_eq!(found.pipelines.len(), 2, "{found:#?}");
}

/// What serves after `found`.
fn incumbents(found: &Deployment) -> Vec<Incumbent> {
    let incumbent = |pipeline: &Assignment| Incumbent {
        stages: pipeline.stages.clone(),
        kv_blocks: pipeline.kv_blocks,
    };
    found.pipelines.iter().map(incumbent).collect()
}

#[test]
fn what_serves_stays_to_the_block_when_a_worker_comes() {
    let mut before = problem(10, ["a", "b"].map(|id| worker(id, 2_000, MS, MS)).into());
    let old = deploy(&before).unwrap();
    before.options.incumbent = incumbents(&old);
    before.workers.push(worker("c", 2_000, MS, MS));
    // More room than before must not change the blocks of those that stay.
    before.options.max_kv_blocks *= 2;
    for spec in &mut before.workers {
        spec.memory_bytes += 5;
    }
    let found = deploy(&before).unwrap();
    check(&before, &found);
    assert_eq!(found.layers_moved, 10, "{found:#?}");
    assert!((found.incumbent_tokens_per_s - old.tokens_per_s).abs() < 1e-6);
    for (index, pipeline) in old.pipelines.iter().enumerate() {
        let now = &found.pipelines[index];
        assert_eq!((&now.stages, now.kv_blocks), (&pipeline.stages, pipeline.kv_blocks));
        assert_eq!(now.continues, Some(index));
    }
}

#[test]
fn a_lost_stage_goes_to_a_spare_worker_and_the_others_stay() {
    let of = |ids: &[&str]| {
        let workers = ids.iter().map(|id| worker(id, 900, MS, 0)).collect();
        let mut problem = problem(9, workers);
        problem.options.stages = Some(3);
        problem
    };
    let old = deploy(&of(&["a", "b", "c"])).unwrap();
    let mut after = of(&["a", "c", "d"]);
    after.options.incumbent = incumbents(&old);
    let found = deploy(&after).unwrap();
    check(&after, &found);
    let [pipeline] = &found.pipelines[..] else { panic!("{found:#?}") };
    let changed: Vec<_> =
        pipeline.stages.iter().filter(|stage| !old.pipelines[0].stages.contains(stage)).collect();
    let [new] = &changed[..] else { panic!("{found:#?}") };
    assert_eq!(new.worker, "d", "{found:#?}");
    assert_eq!((found.layers_moved, pipeline.continues), (3, Some(0)), "{found:#?}");
    assert_eq!(pipeline.kv_blocks, old.pipelines[0].kv_blocks);
}
