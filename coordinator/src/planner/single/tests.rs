//! What every plan promises, against brute force and by cases.

use proptest::prelude::*;

use super::*;

fn worker(id: &str, memory_bytes: u64, layer_ns: u64, head_ns: u64) -> WorkerSpec {
    WorkerSpec { id: id.to_owned(), memory_bytes, layer_ns, head_ns }
}

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

fn options(stages: Option<u32>) -> Options {
    Options { stages, min_kv_blocks: 4, max_kv_blocks: 64, incumbent: Vec::new() }
}

fn fixed_bytes(model: &ModelCosts, first: bool, last: bool) -> u64 {
    let has_head = last || (first && model.tied_head);
    let (embedding, head) =
        (model.embedding_bytes * u64::from(first), model.head_bytes * u64::from(has_head));
    if model.tied_head { embedding.max(head) } else { embedding + head }
}

/// Time of a cut and the KV blocks it holds, or `None` if a stage does not fit. `cut` has a worker
/// and its number of layers for every stage.
fn judge(model: &ModelCosts, options: &Options, cut: &[(&WorkerSpec, u32)]) -> Option<(u64, u32)> {
    let mut slowest = 0;
    let mut kv_blocks = options.max_kv_blocks.max(options.min_kv_blocks).max(1);
    for (i, &(w, layers)) in cut.iter().enumerate() {
        let (first, last) = (i == 0, i + 1 == cut.len());
        let weights = u64::from(layers) * model.layer_bytes + fixed_bytes(model, first, last);
        let room = w.memory_bytes.checked_sub(weights)?;
        let blocks = room / (u64::from(layers) * model.kv_block_layer_bytes);
        kv_blocks = kv_blocks.min(blocks.try_into().unwrap_or(u32::MAX));
        let head_ns = match (first != last && model.tied_head, last) {
            (true, true) => w.head_ns.div_ceil(2),
            (true, false) => w.head_ns / 2,
            (false, last) => w.head_ns * u64::from(last),
        };
        slowest = slowest.max(u64::from(layers) * w.layer_ns + head_ns);
    }
    (kv_blocks >= options.min_kv_blocks.max(1)).then_some((slowest, kv_blocks))
}

/// The fastest cut into exactly `stages`, and the most KV of the fastest ones.
fn brute_force(
    model: &ModelCosts,
    workers: &[WorkerSpec],
    options: &Options,
    stages: u32,
) -> Option<(u64, u32)> {
    fn walk<'a>(
        model: &ModelCosts,
        workers: &'a [WorkerSpec],
        options: &Options,
        stages: u32,
        cut: &mut Vec<(&'a WorkerSpec, u32)>,
        left: u32,
        best: &mut Option<(u64, u32)>,
    ) {
        if stages == 0 {
            let Some((time, blocks)) = (left == 0).then(|| judge(model, options, cut)).flatten()
            else {
                return;
            };
            if best.is_none_or(|(t, b)| time < t || (time == t && blocks > b)) {
                *best = Some((time, blocks));
            }
            return;
        }
        for w in workers {
            if cut.iter().any(|(other, _)| other.id == w.id) {
                continue;
            }
            for layers in 1..=left {
                cut.push((w, layers));
                walk(model, workers, options, stages - 1, cut, left - layers, best);
                cut.pop();
            }
        }
    }
    let mut best = None;
    walk(model, workers, options, stages, &mut Vec::new(), model.layers, &mut best);
    best
}

/// What every plan promises: each layer once and in order, no worker twice, memory and time as said.
fn check(model: &ModelCosts, workers: &[WorkerSpec], options: &Options, plan: &Assignment) {
    let mut next = 0;
    let mut cut = Vec::new();
    for stage in &plan.stages {
        assert_eq!(stage.layers.start, next, "{plan:?}");
        assert!(stage.layers.end > next, "{plan:?}");
        next = stage.layers.end;
        let worker = workers.iter().find(|w| w.id == stage.worker).unwrap();
        assert!(cut.iter().all(|&(other, _): &(&WorkerSpec, u32)| other.id != worker.id));
        cut.push((worker, stage.layers.end - stage.layers.start));
    }
    assert_eq!(next, model.layers, "{plan:?}");
    assert_eq!(judge(model, options, &cut), Some((plan.bottleneck_ns, plan.kv_blocks)), "{plan:?}");
    let rate = f64::from(STEP_ROWS) * 1e9 / plan.bottleneck_ns as f64;
    assert_eq!(plan.predicted_tokens_per_s, rate);
    if let Some(stages) = options.stages {
        assert_eq!(plan.stages.len(), stages as usize);
    }
}

fn arb_workers(count: std::ops::RangeInclusive<usize>) -> impl Strategy<Value = Vec<WorkerSpec>> {
    let one = (100u64..900, 1u64..20, 0u64..60);
    proptest::collection::vec(one, count).prop_map(|all| {
        let named = all.into_iter().enumerate();
        named
            .map(|(i, (memory, layer, head))| worker(&format!("w{i}"), memory, layer, head))
            .collect()
    })
}

fn arb_model() -> impl Strategy<Value = ModelCosts> {
    (1u32..8, 20u64..150, 0u64..200, 0u64..200, any::<bool>(), 1u64..6).prop_map(
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

proptest! {
    #![proptest_config(ProptestConfig::with_cases(600))]

    #[test]
    fn exactly_n_stages_are_as_fast_as_brute_force(
        model in arb_model(), workers in arb_workers(1..=4), stages in 1u32..5, kv in (1u32..9, 9u32..40),
    ) {
        prop_assume!(stages <= model.layers && stages as usize <= workers.len());
        let options = Options { stages: Some(stages), min_kv_blocks: kv.0, max_kv_blocks: kv.1, ..Options::default() };
        let want = brute_force(&model, &workers, &options, stages);
        match plan(&model, &workers, &options) {
            Ok(found) => {
                check(&model, &workers, &options, &found);
                let (time, blocks) = want.expect("a plan was found where there is none");
                prop_assert_eq!(found.bottleneck_ns, time);
                prop_assert!(found.kv_blocks >= blocks, "{} < {}", found.kv_blocks, blocks);
            }
            Err(PlanError::DoesNotFit { .. }) => prop_assert_eq!(want, None),
            Err(other) => prop_assert!(false, "{other}"),
        }
    }

    #[test]
    fn a_free_number_of_stages_is_the_fewest_of_the_fastest(
        model in arb_model(), workers in arb_workers(1..=4),
    ) {
        let options = options(None);
        let all: Vec<_> = (1..=model.layers.min(workers.len() as u32))
            .filter_map(|n| Some((n, brute_force(&model, &workers, &options, n)?.0)))
            .collect();
        match plan(&model, &workers, &options) {
            Ok(found) => {
                check(&model, &workers, &options, &found);
                let least = all.iter().map(|a| a.1).min().unwrap();
                // So small times never tie within one per cent unless they are equal.
                let fewest = all.iter().find(|a| a.1 <= least + least / 1000 * TIE_PER_MILLE).unwrap();
                prop_assert_eq!((found.stages.len() as u32, found.bottleneck_ns), *fewest);
            }
            Err(_) => prop_assert!(all.is_empty()),
        }
    }

    #[test]
    fn the_order_of_workers_changes_nothing(
        model in arb_model(), workers in arb_workers(2..=4), stages in proptest::option::of(1u32..4),
    ) {
        let options = options(stages);
        let mut turned = workers.clone();
        turned.rotate_left(1);
        turned.swap(0, 1);
        prop_assert_eq!(plan(&model, &workers, &options), plan(&model, &turned, &options));
    }

    #[test]
    fn replanning_is_valid_and_costs_no_more_than_was_said(
        model in arb_model(), workers in arb_workers(2..=5), gone in 0usize..5, stages in proptest::option::of(1u32..4),
    ) {
        let before = options(stages);
        let Ok(old) = plan(&model, &workers, &before) else { return Ok(()) };
        let mut left = workers.clone();
        left.remove(gone % workers.len());
        let after = Options { incumbent: old.stages.clone(), ..before.clone() };
        let fresh = plan(&model, &left, &before);
        match plan(&model, &left, &after) {
            Ok(found) => {
                check(&model, &left, &after, &found);
                let bound = fresh.unwrap().bottleneck_ns;
                prop_assert!(found.bottleneck_ns <= bound.max(1) * 122 / 100 + 1);
            }
            Err(error) => prop_assert_eq!(Err(error), fresh),
        }
        let unchanged = plan(&model, &workers, &after).unwrap();
        prop_assert_eq!(unchanged.stages, old.stages, "nothing moves when nobody left");
    }
}

#[test]
fn the_head_counts_as_layers() {
    let workers = ["a", "b", "c"].map(|id| worker(id, 10_000, 10, 50));
    let found = plan(&model(30), &workers, &options(Some(3))).unwrap();
    // 35 layers' worth of time over three: 12, 12, and 6 with the head that costs 5.
    let layers: Vec<_> = found.stages.iter().map(|s| s.layers.clone()).collect();
    assert_eq!(found.bottleneck_ns, 120);
    assert_eq!(layers.last(), Some(&(24..30)), "{layers:?}");
    check(&model(30), &workers, &options(Some(3)), &found);
}

#[test]
fn a_tied_head_is_shared_by_the_first_and_the_last() {
    let workers = ["a", "b", "c"].map(|id| worker(id, 10_000, 10, 60));
    let tied = ModelCosts { tied_head: true, ..model(30) };
    let found = plan(&tied, &workers, &options(Some(3))).unwrap();
    let layers: Vec<_> = found.stages.iter().map(|s| s.layers.clone()).collect();
    assert_eq!((found.bottleneck_ns, layers), (120, vec![0..9, 9..21, 21..30]));
    check(&tied, &workers, &options(Some(3)), &found);
}

#[test]
fn a_slow_worker_is_left_out_when_that_is_faster() {
    let workers = [worker("fast", 10_000, 10, 0), worker("slow", 10_000, 1000, 0)];
    let found = plan(&model(4), &workers, &options(None)).unwrap();
    assert_eq!(found.stages, [Stage { worker: "fast".to_owned(), layers: 0..4 }]);
    assert!(found.reason.contains("more than 1 stages would not be faster"), "{}", found.reason);
}

#[test]
fn a_lost_stage_goes_to_the_standby_and_the_others_stay() {
    let workers: Vec<_> = ["a", "b", "c", "d"].map(|id| worker(id, 10_000, 10, 10)).into();
    let incumbent: Vec<_> = [("a", 0..3), ("b", 3..6), ("c", 6..8)]
        .map(|(worker, layers)| Stage { worker: worker.to_owned(), layers })
        .into();
    let left = [workers[0].clone(), workers[2].clone(), workers[3].clone()];
    let found =
        plan(&model(8), &left, &Options { incumbent: incumbent.clone(), ..options(Some(3)) });
    let found = found.unwrap();
    assert_eq!(found.stages[0], incumbent[0]);
    assert_eq!(found.stages[1], Stage { worker: "d".to_owned(), layers: 3..6 });
    assert_eq!(found.stages[2], incumbent[2]);
    assert!(found.reason.contains("2 stages stay"), "{}", found.reason);
}

#[test]
fn impossible_wishes_are_named() {
    let two = [worker("a", 10_000, 1, 1), worker("b", 10_000, 1, 1)];
    let cases: [(&[WorkerSpec], u32, Option<u32>, &str); 4] = [
        (&[], 4, None, "no worker can serve this model"),
        (&two, 4, Some(5), "5 stages were asked for, the model has only 4 layers"),
        (&two, 4, Some(3), "3 stages were asked for, only 2 workers can serve this model"),
        (
            &two,
            400,
            None,
            "the model does not fit: the workers have 20000 bytes in all, weights and 4 KV blocks \
             need 41710 bytes",
        ),
    ];
    for (workers, layers, stages, want) in cases {
        let error = plan(&model(layers), workers, &options(stages)).unwrap_err();
        assert_eq!(error.to_string(), want);
    }
}
