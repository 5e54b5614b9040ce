//! The registry, its questions and answers, and what is said when nothing serves.

use super::*;

#[test]
fn an_unreadable_plan_is_replaced_where_it_is() {
    let mut cluster = Cluster::new(options(Some(2)));
    let now = Tick::ZERO;
    cluster.handle(now, Event::Reset(workers(2)));
    let mut actions = cluster.handle(now, Event::TermGained(Term(7)));
    actions.retain(|action| !matches!(action, Action::Probe { .. }));
    let [Action::ReadPlan { ticket }] = actions[..] else { panic!("{actions:?}") };
    let found = Found::Unreadable { revision: 33, detail: "not JSON".to_owned() };
    let mut actions = cluster.handle(now, Event::PlanRead { ticket, found });
    let Some(Action::Deploy { ticket, problem }) = actions.pop() else { panic!("{actions:?}") };
    let deployed = Event::Deployed { ticket, result: place(&problem) };
    let actions = cluster.handle(now, deployed);
    assert!(matches!(&actions[..], [Action::WritePlan { previous: Some(33), .. }]), "{actions:?}");
}

#[test]
fn answers_to_other_questions_are_ignored() {
    let mut cluster = Cluster::new(options(Some(2)));
    let now = Tick::ZERO;
    cluster.handle(now, Event::Reset(workers(2)));
    let actions = cluster.handle(now, Event::TermGained(Term(7)));
    let Action::ReadPlan { ticket: read } = actions[0] else { panic!("{actions:?}") };
    let found = Found::Nothing;
    let mut actions = cluster.handle(now, Event::PlanRead { ticket: read, found: found.clone() });
    let Some(Action::Deploy { ticket, problem }) = actions.pop() else { panic!("{actions:?}") };
    let stale = Event::Deployed { ticket: Ticket(ticket.0 + 1), result: place(&problem) };
    assert_eq!(cluster.handle(now, stale), [], "nobody asked that");
    let actions = cluster.handle(now, Event::Deployed { ticket, result: place(&problem) });
    let [Action::WritePlan { ticket: write, .. }] = actions[..] else { panic!("{actions:?}") };
    // The term is lost and won again while the write is on its way.
    cluster.handle(now, Event::TermLost);
    let actions = cluster.handle(now, Event::TermGained(Term(20)));
    let again = actions.iter().find_map(|action| match action {
        Action::ReadPlan { ticket } => Some(*ticket),
        _ => None,
    });
    let again = again.expect("it is read back");
    let late = Event::PlanWritten { ticket: write, revision: 21 };
    assert_eq!(cluster.handle(now, late), [], "of the reign before");
    let late = Event::PlanRead { ticket: read, found };
    assert_eq!(cluster.handle(now, late), [], "of the reign before");
    let answered = Event::PlanRead { ticket: again, found: Found::Nothing };
    cluster.handle(now, answered);
    let actions = cluster.handle(Tick::from_millis(1000), Event::Tick);
    assert!(matches!(&actions[..], [Action::Deploy { .. }]), "{actions:?}");
}

#[test]
fn an_unknown_outcome_is_read_back_and_never_written_blindly() {
    let mut cluster = Cluster::new(options(Some(2)));
    let now = Tick::ZERO;
    cluster.handle(now, Event::Reset(workers(2)));
    let actions = cluster.handle(now, Event::TermGained(Term(7)));
    let Action::ReadPlan { ticket } = actions[0] else { panic!("{actions:?}") };
    let mut actions = cluster.handle(now, Event::PlanRead { ticket, found: Found::Nothing });
    let Some(Action::Deploy { ticket, problem }) = actions.pop() else { panic!("{actions:?}") };
    let mut actions = cluster.handle(now, Event::Deployed { ticket, result: place(&problem) });
    let Some(Action::WritePlan { ticket, plan, .. }) = actions.pop() else { panic!() };
    let unknown = Event::PlanUnknown { ticket, detail: "timeout".to_owned() };
    let actions = cluster.handle(now, unknown);
    let [Action::ReadPlan { ticket }] = actions[..] else { panic!("{actions:?}") };
    let mut read = plan;
    read.pipelines[0].predicted_tokens_per_s += 1e-9;
    let found = Found::Plan { revision: 33, plan: read };
    cluster.handle(now, Event::PlanRead { ticket, found });
    let mut prepared = Vec::new();
    for worker in ["w0", "w1"] {
        let (worker, incarnation) = (worker.to_owned(), Incarnation([1; 16]));
        let held = Vec::new();
        prepared.extend(cluster.handle(now, Event::Described { worker, incarnation, held }));
    }
    assert!(
        matches!(&prepared[..], [Action::Prepare(a), Action::Prepare(b)]
        if a.epoch == Epoch(33) && b.stage == 1),
        "{prepared:?}"
    );
}

#[test]
fn without_a_registry_it_goes_on_serving_and_takes_its_lanes_along() {
    let mut script = Script::new(Some(2), workers(2));
    script.pass(20_000);
    script.take();
    let serving = script.at(1);
    script.tell(Event::TermLost);
    script.pass(600_000);
    assert_eq!(script.take(), []);
    assert_eq!(script.cluster.availability(), Availability::Serving);
    // The same plan: lanes get the new term before any worker hears of it.
    script.tell(Event::TermGained(Term(200)));
    assert_eq!(script.take(), [Action::Resume { at: serving, term: Term(200) }]);
    // Somebody else's plan ends what is not in it.
    script.tell(Event::TermLost);
    let Found::Plan { mut plan, .. } = script.found.clone() else { panic!() };
    plan.term = Term(300);
    script.found = Found::Plan { revision: 301, plan };
    script.revision = 500;
    script.tell(Event::TermGained(Term(400)));
    let actions = script.take();
    assert!(
        matches!(&actions[0], Action::Fail { at, reason } if *at == serving
            && reason == "another coordinator has changed the plan"),
        "{actions:?}"
    );
    assert!(matches!(actions.last(), Some(Action::Serve { .. })), "{actions:?}");
}

#[test]
fn a_registry_that_went_back_is_given_up_with_both_numbers() {
    let resigned = |actions: &[Action]| {
        actions.iter().find_map(|action| match action {
            Action::Resign { detail } => Some(detail.clone()),
            _ => None,
        })
    };
    let mut script = Script::new(Some(2), workers(2));
    script.take();
    script.tell(Event::TermLost);
    script.tell(Event::TermGained(Term(60)));
    let detail = resigned(&script.take()).expect("it resigns");
    assert!(detail.contains("term 60") && detail.contains("revision 101"), "{detail}");
    assert_eq!(script.cluster.view().term, None);
    assert_eq!(script.cluster.availability(), Availability::Serving, "what serves goes on");
    // A plan of a later term than the one that was won.
    let Found::Plan { mut plan, .. } = script.found.clone() else { panic!() };
    plan.term = Term(900);
    let mut other = Script::with(options(Some(2)), workers(2), Found::Plan { revision: 950, plan });
    let detail = resigned(&other.take()).expect("it resigns");
    assert!(detail.contains("term 900") && detail.contains("term 7"), "{detail}");
    let Availability::No(waiting) = other.cluster.availability() else { panic!() };
    assert_eq!((waiting.cause, &waiting.detail), (WaitCause::Registry, &detail));
    // The plan's own revision.
    let mut cluster = Cluster::new(options(Some(2)));
    let now = Tick::ZERO;
    cluster.handle(now, Event::Reset(workers(2)));
    let actions = cluster.handle(now, Event::TermGained(Term(70)));
    let Action::ReadPlan { ticket } = actions[0] else { panic!("{actions:?}") };
    let mut actions = cluster.handle(now, Event::PlanRead { ticket, found: Found::Nothing });
    let Some(Action::Deploy { ticket, problem }) = actions.pop() else { panic!("{actions:?}") };
    let actions = cluster.handle(now, Event::Deployed { ticket, result: place(&problem) });
    let [Action::WritePlan { ticket, .. }] = actions[..] else { panic!("{actions:?}") };
    let actions = cluster.handle(now, Event::PlanWritten { ticket, revision: 40 });
    let detail = resigned(&actions).expect("it resigns");
    assert!(detail.contains("revision 40") && detail.contains("revision 70"), "{detail}");
}

#[test]
fn one_cause_everywhere_from_the_start_to_the_end() {
    let mut cluster = Cluster::new(options(None));
    let at = Tick::from_millis;
    let look = |cluster: &Cluster| cause(&cluster.availability());
    assert_eq!(look(&cluster), Some(WaitCause::Starting), "it may lead in a moment");
    cluster.handle(at(3000), Event::Tick);
    let refused = cluster.availability();
    assert!(matches!(&refused, Availability::No(why) if why.cause == WaitCause::Leadership));
    let actions = cluster.handle(at(3000), Event::TermGained(Term(7)));
    let Action::ReadPlan { ticket } = actions[0] else { panic!("{actions:?}") };
    assert_eq!(cluster.availability().waiting().unwrap().detail, "the plan is being read");
    let detail = "etcd is away".to_owned();
    cluster.handle(at(3000), Event::PlanReadFailed { ticket, detail });
    let Availability::No(why) = cluster.availability() else { panic!() };
    assert_eq!(why.cause, WaitCause::Registry);
    assert_eq!(why.detail, "the plan cannot be read: etcd is away");
    assert_eq!(cluster.view().plan.reason, why.detail, "status says the same");
    let actions = cluster.handle(at(4000), Event::Tick);
    let Action::ReadPlan { ticket } = actions[0] else { panic!("{actions:?}") };
    cluster.handle(at(4000), Event::PlanRead { ticket, found: Found::Nothing });
    assert_eq!(look(&cluster), Some(WaitCause::Starting));
    let mut actions = cluster.handle(at(4000), Event::Reset(Vec::new()));
    let Some(Action::Deploy { ticket, problem }) = actions.pop() else { panic!("{actions:?}") };
    cluster.handle(at(4000), Event::Deployed { ticket, result: place(&problem) });
    let Availability::No(why) = cluster.availability() else { panic!() };
    assert_eq!(
        (why.cause, why.detail.as_str()),
        (WaitCause::Workers, "no worker can serve this model")
    );
    cluster.handle(at(4000), Event::WorkerPut(record(0, 1)));
    assert!(matches!(cluster.availability(), Availability::Soon(_)), "one came");
}

#[test]
fn who_refuses_the_same_twice_is_no_reason_to_wait() {
    let mut cluster = Cluster::new(options(Some(1)));
    let mut now = Tick::ZERO;
    let mut pending = cluster.handle(now, Event::TermGained(Term(7)));
    pending.extend(cluster.handle(now, Event::Reset(workers(1))));
    let (mut revision, mut refusals) = (50, Vec::new());
    for _ in 0..400 {
        let mut next = Vec::new();
        for action in pending {
            let answer = match action {
                Action::ReadPlan { ticket } => Event::PlanRead { ticket, found: Found::Nothing },
                Action::Deploy { ticket, problem } => {
                    Event::Deployed { ticket, result: place(&problem) }
                }
                Action::WritePlan { ticket, .. } => {
                    revision += 1;
                    Event::PlanWritten { ticket, revision }
                }
                Action::Prepare(request) => Event::PrepareFailed {
                    at: PipelineRef { id: request.pipeline, epoch: request.epoch },
                    stage: 0,
                    failure: Failure::Refused,
                    detail: "the store is damaged".to_owned(),
                },
                Action::Probe { worker, incarnation, .. } => {
                    Event::Described { worker, incarnation, held: Vec::new() }
                }
                _ => continue,
            };
            next.extend(cluster.handle(now, answer));
            if let Availability::No(why) = cluster.availability() {
                refusals.push((now, why));
            }
        }
        pending = next;
        if pending.is_empty() {
            now = now + Duration::from_millis(250);
            pending = cluster.handle(now, Event::Tick);
        }
    }
    refusals.dedup_by(|a, b| a.0 == b.0);
    assert!(refusals.len() >= 2, "each refusal is told: {refusals:?}");
    for (_, why) in &refusals {
        assert_eq!(why.cause, WaitCause::Refused);
        assert!(why.detail.contains("w0: could not take its stage: the store is damaged"));
    }
    assert!(revision - 50 < 10, "{} plans", revision - 50);
}

#[test]
fn transient_refusals_are_tried_again_a_bounded_number_of_times() {
    let mut cluster = Cluster::new(options(Some(1)));
    let mut now = Tick::ZERO;
    cluster.handle(now, Event::Reset(workers(1)));
    let mut pending = cluster.handle(now, Event::TermGained(Term(7)));
    let mut tries = 0;
    for _ in 0..60 {
        let mut next = Vec::new();
        for action in pending {
            let answer = match action {
                Action::ReadPlan { ticket } => Event::PlanRead { ticket, found: Found::Nothing },
                Action::Deploy { ticket, problem } => {
                    Event::Deployed { ticket, result: place(&problem) }
                }
                Action::WritePlan { ticket, .. } => Event::PlanWritten { ticket, revision: 8 },
                Action::Prepare(request) => {
                    tries += 1;
                    Event::PrepareFailed {
                        at: PipelineRef { id: request.pipeline, epoch: request.epoch },
                        stage: 0,
                        failure: Failure::Transient,
                        detail: "not reached".to_owned(),
                    }
                }
                _ => continue,
            };
            next.extend(cluster.handle(now, answer));
        }
        now = now + Duration::from_millis(100);
        next.extend(cluster.handle(now, Event::Tick));
        pending = next;
    }
    assert_eq!(tries, START_TRIES);
}
