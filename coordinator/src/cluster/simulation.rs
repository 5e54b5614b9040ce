//! Coordinators against a world of workers and a registry that lose, delay and reorder: random
//! faults, invariants on every action, and in the end, when all is healed, somebody must serve.

mod world;

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;

use world::{Fault, World};
pub(super) use world::{class, options, place, record};

/// Enough to meet every fault in every state many times over, in seconds.
const CASES: u32 = 100;

fn arb_fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        8 => (1u64..3000).prop_map(Fault::Pass),
        6 => (100u64..15_000).prop_map(Fault::Run),
        30 => any::<usize>().prop_map(|which| Fault::CarryOut(which, false)),
        3 => any::<usize>().prop_map(|which| Fault::CarryOut(which, true)),
        1 => any::<usize>().prop_map(Fault::Kill),
        2 => any::<usize>().prop_map(Fault::Restart),
        1 => any::<usize>().prop_map(Fault::LoseLease),
        2 => any::<usize>().prop_map(Fault::Register),
        1 => any::<usize>().prop_map(Fault::Drain),
        1 => any::<usize>().prop_map(Fault::BreakStream),
        1 => any::<usize>().prop_map(Fault::Overdue),
        1 => any::<usize>().prop_map(Fault::LoseTerm),
        3 => any::<usize>().prop_map(Fault::Lead),
        2 => any::<usize>().prop_map(Fault::Usurp),
        1 => any::<usize>().prop_map(Fault::Relist),
        1 => any::<usize>().prop_map(Fault::PlanNow),
        2 => any::<(usize, bool, bool)>()
            .prop_map(|(which, drain, force)| Fault::Order(which, drain, force)),
        1 => Just(Fault::DeletePlan),
    ]
}

/// How many engines each worker has memory for.
fn arb_nodes() -> impl Strategy<Value = Vec<usize>> {
    proptest::collection::vec(1usize..3, 2..7)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(CASES))]

    #[test]
    fn whatever_happens_it_keeps_the_rules_and_serves_again_when_healed(
        nodes in arb_nodes(), stages in proptest::option::of(1u32..3), coordinators in 1usize..3,
        faults in proptest::collection::vec(arb_fault(), 0..100),
    ) {
        let mut world = World::new(&nodes, stages, coordinators);
        world.lead(0);
        world.list_all();
        for fault in faults {
            world.apply(fault);
        }
        world.heal();
        // Longer than the longest quarantine that three losses in a row can bring.
        world.run(Duration::from_secs(4000), Duration::from_secs(20));
        prop_assert!(world.leader_serves(), "{:?}", world.reasons());
        // Whoever comes back is waited for, and then nothing changes any more.
        world.run(Duration::from_secs(200), Duration::from_millis(500));
        let (served, writes) = (world.served(), world.writes());
        world.run(Duration::from_secs(60), Duration::from_millis(250));
        prop_assert_eq!(world.served(), served, "what is healthy is left alone");
        prop_assert_eq!(world.writes(), writes, "nothing is planned again and again");
        world.check_memory();
        world.check_one_acts();
    }

    #[test]
    fn a_loss_is_made_good_within_seconds(
        nodes in arb_nodes(), stages in proptest::option::of(1u32..3),
        lost in proptest::collection::vec(any::<usize>(), 1..3), takes_over: bool,
    ) {
        let mut world = World::new(&nodes, stages, 2);
        world.lead(0);
        world.list_all();
        world.run(Duration::from_secs(30), Duration::from_millis(100));
        prop_assert!(world.leader_serves(), "{:?}", world.reasons());
        let writes = world.writes();
        for which in &lost {
            world.apply(Fault::Kill(*which));
        }
        if takes_over {
            world.apply(Fault::LoseTerm(0));
            world.lead(1);
        }
        if world.possible() {
            // A lease, two seconds, and the tries of a worker that does not answer.
            world.run(Duration::from_secs(5 + 2 + 5), Duration::from_millis(100));
            prop_assert!(world.leader_serves(), "{:?}", world.reasons());
        }
        for which in &lost {
            world.apply(Fault::Restart(*which));
        }
        world.run(Duration::from_secs(40), Duration::from_millis(100));
        prop_assert!(world.leader_serves(), "{:?}", world.reasons());
        prop_assert!(world.writes() - writes <= 4 + 2 * lost.len(), "{} plans", world.writes() - writes);
        world.check_memory();
    }

    #[test]
    fn leases_alone_evict_nobody(
        nodes in arb_nodes(),
        lost in proptest::collection::vec((any::<usize>(), any::<bool>()), 1..40),
    ) {
        let mut world = World::new(&nodes, Some(2), 1);
        world.lead(0);
        world.list_all();
        world.run(Duration::from_secs(30), Duration::from_millis(250));
        let served = world.served();
        prop_assert!(!served.is_empty());
        for (which, back) in lost {
            world.apply(Fault::LoseLease(which));
            world.run(Duration::from_millis(700), Duration::from_millis(100));
            if back {
                world.apply(Fault::Register(which));
            }
        }
        world.run(Duration::from_secs(100), Duration::from_millis(500));
        for at in served {
            prop_assert!(world.served().contains(&at), "{at} was touched");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(30))]

    #[test]
    fn nobody_waits_for_a_worker_that_flaps_and_cannot_be_spared(
        nodes in proptest::collection::vec(1usize..3, 1..4), times in 1usize..6, which: usize,
        pause_ms in 100u64..20_000,
    ) {
        let step = Duration::from_millis(250);
        let mut world = World::new(&nodes, Some(nodes.len() as u32), 1);
        world.lead(0);
        world.list_all();
        world.run(Duration::from_secs(30), step);
        for _ in 0..times {
            world.apply(Fault::Kill(which));
            world.run(Duration::from_millis(pause_ms), step);
            world.apply(Fault::Restart(which));
            // What it takes to plan again what was young when it was lost.
            world.run(Duration::from_secs(15), step);
            prop_assert!(world.leader_serves(), "{:?}", world.reasons());
        }
        let writes = world.writes();
        world.run(Duration::from_secs(120), step);
        prop_assert_eq!(world.writes(), writes, "and nothing changes when its time is over");
    }

    #[test]
    fn an_order_to_drain_is_carried_out_whoever_leads(
        nodes in proptest::collection::vec(2usize..3, 1..6), stages in proptest::option::of(1u32..3),
        which: usize, force: bool, wait_ms in 0u64..3000, takes_over: bool,
    ) {
        let step = Duration::from_millis(100);
        let mut world = World::new(&nodes, stages, 2);
        world.supervise();
        world.lead(0);
        world.list_all();
        world.run(Duration::from_secs(30), step);
        let which = which % nodes.len();
        let before = world.starts(which);
        world.apply(Fault::Order(2 * which, true, force));
        // Until it is in the registry; after that whoever leads knows of it.
        world.run(Duration::from_millis(100 + wait_ms), step);
        if takes_over {
            world.lead(1);
        }
        world.run(Duration::from_secs(30), step);
        let is_spared = nodes.len() as u32 > stages.unwrap_or(1) || !world.possible();
        prop_assert_eq!(world.starts(which) > before, is_spared || force, "{:?}", world.reasons());
        if world.possible() {
            prop_assert!(world.leader_serves(), "{:?}", world.reasons());
        }
        world.check_memory();
    }
}

/// A worker that comes is planned for once ...
const PLANS_FOR_A_COMER: usize = 1;
/// ... and one that is killed and comes back is planned for when it is lost and when it is back.
const PLANS_FOR_A_DEATH: usize = 2;

/// A hold-down, and what a plan takes to serve.
const AT_REST: Duration = Duration::from_secs(10 + 5);

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn workers_that_come_one_by_one_and_die_in_turn_cost_a_bounded_number_of_plans(
        engines in proptest::collection::vec(1usize..3, 4), stages in proptest::option::of(1u32..3),
        gaps_ms in proptest::collection::vec(100u64..30_000, 8), is_real: bool,
        order in Just(vec![0usize, 1, 2, 3]).prop_shuffle(),
    ) {
        let step = Duration::from_millis(100);
        let mut world = World::new(&engines, stages, 1);
        if is_real {
            world = world.with_real_planner();
        }
        for late in 1..4 {
            world.keep_away(late);
        }
        world.lead(0);
        world.list_all();
        for (late, gap_ms) in (1..4).zip(&gaps_ms) {
            world.run(Duration::from_millis(*gap_ms), step);
            world.apply(Fault::Restart(late));
        }
        world.run(AT_REST, step);
        let mut allowed = 4 * PLANS_FOR_A_COMER;
        prop_assert!(world.writes() <= allowed, "{} plans for four who come", world.writes());
        for (dies, gap_ms) in order.iter().zip(&gaps_ms[4..]) {
            world.apply(Fault::Kill(*dies));
            world.run(Duration::from_millis(*gap_ms), step);
            world.apply(Fault::Restart(*dies));
            world.run(AT_REST, step);
            allowed += PLANS_FOR_A_DEATH;
            prop_assert!(world.writes() <= allowed, "{} plans, not {allowed}", world.writes());
            prop_assert!(world.leader_serves(), "{:?}", world.reasons());
        }
        // It ends where the planner says: asked whatever the gain, it finds nothing worth a move.
        let (rate, served) = (world.rate(), world.served());
        world.apply(Fault::PlanNow(0));
        world.run(AT_REST, step);
        let gain = world.rate() / rate;
        prop_assert!(gain <= 1.05, "{served:?} at {rate}, and {gain} times as much is possible");
        world.check_memory();
    }

    #[test]
    fn equal_events_give_equal_actions_whatever_they_are(
        nodes in arb_nodes(), stages in proptest::option::of(1u32..3),
        faults in proptest::collection::vec(arb_fault(), 0..80),
    ) {
        let trace = || {
            let mut world = World::new(&nodes, stages, 2);
            world.lead(0);
            world.list_all();
            let seen = faults.iter().cloned().map(|fault| {
                world.apply(fault);
                world.snapshot()
            });
            seen.collect::<Vec<_>>()
        };
        prop_assert_eq!(trace(), trace());
    }
}

/// A plan that another coordinator forestalled is no decision: who wrote it in vain, and learns from
/// the registry that it leads no more, plans again when it leads again.
#[test]
fn whoever_was_deposed_unheard_serves_when_it_leads_again() {
    let mut world = World::new(&[1, 1], None, 2);
    world.lead(0);
    world.list_all();
    world.apply(Fault::Usurp(1));
    world.run(Duration::from_millis(1145), Duration::from_millis(143));
    assert!(world.leader_serves(), "{:?}", world.reasons());
    world.lead(0);
    world.run(Duration::from_secs(30), Duration::from_millis(250));
    assert!(world.leader_serves(), "{:?}", world.reasons());
    world.check_one_acts();
}

#[test]
fn equal_events_give_equal_actions() {
    let trace = || {
        let mut world = World::new(&[2, 1, 2, 1], None, 2);
        let mut seen = BTreeMap::new();
        world.lead(0);
        world.list_all();
        for i in 0..300usize {
            world.apply(match i % 9 {
                0 => Fault::Kill(i),
                4 => Fault::Restart(i),
                8 => Fault::Pass(400),
                _ => Fault::CarryOut(i, i % 31 == 0),
            });
            seen.insert(i, world.snapshot());
        }
        seen
    };
    assert_eq!(trace(), trace());
}
