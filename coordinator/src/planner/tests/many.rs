//! Many workers, where not every partition is looked at: against every partition, against what nobody
//! can exceed, and how much is looked at.

use std::cell::Cell;

use proptest::strategy::ValueTree;
use proptest::test_runner::TestRunner;

use super::super::grouping::EXACT_WORKERS;
use super::*;

/// The search of many workers, however few there are.
fn deploy_as_many(problem: &Problem) -> Result<Deployment, PlanError> {
    let mut costs = Costs::new(problem, &|| true);
    costs.exact_workers = 0;
    run(&costs, problem)
}

/// Tokens per second of all workers if neither memory nor hops, neither norm nor head nor whole layers
/// held them back.
fn most(problem: &Problem) -> f64 {
    let layers = f64::from(problem.model.layers);
    let rate = |step: &StepTime| f64::from(step.rows) * 1e9 / (step.layer_ns as f64 * layers);
    let of = |worker: &WorkerSpec| worker.steps.iter().map(rate).fold(0.0, f64::max);
    problem.workers.iter().map(of).sum()
}

/// Workers as they are in racks: layers of 1 to 8 ms, heads of some layers, whole models, halves or
/// thirds of them in memory, racks and machines.
fn arb_fleet(count: std::ops::RangeInclusive<usize>) -> impl Strategy<Value = Problem> {
    let one = (1000u64..8000, 2u64..9, 0u64..40, 0u8..4, 0u8..9, 4u32..17);
    let workers = proptest::collection::vec(one, count);
    let objective = prop_oneof![
        2 => Just(Objective::default()),
        1 => (300u64..3000).prop_map(|ms| Objective::Throughput {
            token_time: Some(Duration::from_millis(ms)),
        }),
        1 => Just(Objective::Latency),
    ];
    (workers, 700u64..2500, 8u32..31, objective).prop_map(|(workers, least, layers, objective)| {
        let spec = |(i, (us, head, memory, rack, machine, rows))| WorkerSpec {
            machine: format!("m{machine}"),
            rack: format!("r{rack}"),
            steps: steps(rows, us * 1000, us * 1000 * head),
            ..worker(&format!("w{i:02}"), least + memory * memory * 4, 1, 1)
        };
        let mut problem = problem(layers, workers.into_iter().enumerate().map(spec).collect());
        problem.options.objective = objective;
        problem
    })
}

/// The same fleets in every run.
fn fleets(count: std::ops::RangeInclusive<usize>, number: u32) -> Vec<Problem> {
    let mut runner = TestRunner::deterministic();
    let fleets = arb_fleet(count);
    (0..number).map(|_| fleets.new_tree(&mut runner).unwrap().current()).collect()
}

#[test]
fn few_workers_planned_as_many_give_nearly_as_much() {
    let mut shares = Vec::new();
    for problem in fleets(3..=6, 750 * soak()) {
        match (deploy(&problem), deploy_as_many(&problem)) {
            (Ok(all), Ok(found)) => {
                check(&problem, &found);
                shares.push(found.tokens_per_s / all.tokens_per_s);
            }
            (all, found) => assert_eq!(all, found, "{problem:#?}"),
        }
    }
    shares.sort_by(f64::total_cmp);
    let mean = shares.iter().sum::<f64>() / shares.len() as f64;
    let poor = shares.iter().filter(|share| **share < 0.99).count();
    assert!(mean > 0.998, "the mean of {}: {mean}", shares.len());
    assert!(poor == 0, "{poor} of {} are a hundredth behind: {:?}", shares.len(), &shares[..5]);
}

/// So many workers with these bytes of memory, from one to the other, as unequal as the numbers are.
fn fleet(count: u64, (least, most): (u64, u64), objective: Objective) -> Problem {
    let spec = |i: u64| WorkerSpec {
        rack: format!("r{}", i % 4),
        steps: steps(16, 600_000 + i * 7_919 % 97 * 80_000, 8_000_000 + i * 104_729 % 89 * 500_000),
        ..worker(&format!("w{i:02}"), least + i * 6_700_417 % (most - least), 1, 1)
    };
    let mut problem = problem(30, (0..count).map(spec).collect());
    problem.options.objective = objective;
    problem
}

const BOUNDED: Objective = Objective::Throughput { token_time: Some(Duration::from_millis(250)) };

#[test]
fn large_fleets_are_planned_with_bounded_work_and_lose_little() {
    // Everybody holds the model, or two to four of them do.
    for (memory, objective, least_share) in [
        ((6_000, 20_000), Objective::default(), 0.75),
        ((1_000, 2_000), Objective::default(), 0.44),
        ((1_000, 2_000), BOUNDED, 0.3),
        ((1_000, 2_000), Objective::Latency, 0.01),
    ] {
        let problem = fleet(64, memory, objective);
        let costs = Costs::new(&problem, &|| true);
        let found = run(&costs, &problem).unwrap();
        check(&problem, &found);
        // Some 60 ms of a release build in all.
        assert!(costs.work() < 2_500_000, "{memory:?} {objective:?}: {}", costs.work());
        let share = found.tokens_per_s / most(&problem);
        assert!((least_share..=1.0).contains(&share), "{memory:?} {objective:?}: {share}");
    }
}

#[test]
fn a_plan_that_nobody_wants_any_more_is_given_up_at_once() {
    let problem = fleet(64, (1_000, 2_000), BOUNDED);
    let of = |asked_most: u64| {
        let asked = Cell::new(0);
        let is_wanted = || {
            asked.set(asked.get() + 1);
            asked.get() <= asked_most
        };
        let costs = Costs::new(&problem, &is_wanted);
        (run(&costs, &problem), costs.work())
    };
    let (whole, all) = of(u64::MAX);
    assert_eq!(whole, deploy(&problem));
    for asked in [0, 10, 40] {
        let (found, work) = of(asked);
        assert_eq!(found, Err(PlanError::NotWanted));
        assert!(work * 4 < all, "{work} of {all} after {asked}");
    }
}

#[test]
fn the_order_of_many_workers_changes_nothing() {
    for objective in [Objective::default(), BOUNDED, Objective::Latency] {
        let problem = fleet(EXACT_WORKERS as u64 + 3, (1_000, 4_000), objective);
        let found = deploy(&problem);
        check(&problem, found.as_ref().unwrap());
        let mut turned = problem.clone();
        turned.workers.reverse();
        turned.workers.swap(1, 4);
        assert_eq!(found, deploy(&turned));
    }
}

#[test]
fn the_way_through_a_group_is_that_of_its_path() {
    for problem in fleets(2..=7, 50) {
        let costs = Costs::new(&problem, &|| true);
        let all: Vec<usize> = (0..costs.workers.len()).collect();
        let spread = costs.spread(&all);
        let mut least = u64::MAX;
        for first in all.iter().copied() {
            for last in all.iter().copied().filter(|last| *last != first) {
                let way_ns = costs.way_ns(&spread, first, last);
                let path = costs.path(&all, first, last);
                assert_eq!(way_ns, costs.hops_ns(&path), "{first} to {last}: {problem:#?}");
                least = least.min(way_ns);
            }
        }
        assert!(spread.least_hops_ns() <= least);
    }
}
