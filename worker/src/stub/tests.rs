//! The same tokens for every cut into chunks and stages, others for every wrong state, and what a profile says.

use bytes::Bytes;
use proto::ids::{Epoch, Incarnation, PipelineId, StepId, Term};
use proto::step::{SamplingParameters, StepHeader};

use super::*;
use crate::tests::harness::{LONG, row, store};

const KV_BLOCKS: u32 = 16;

/// Layers of the model.
const LAYERS: u32 = 4;

fn stage(layers: Range<u32>) -> StubExecutor {
    StubExecutor::new(StubProfile::default(), store().config(), layers, KV_BLOCKS)
}

fn sample() -> Output {
    Output::Sample(Box::<SamplingParameters>::default())
}

fn run(stage: &mut StubExecutor, rows: Vec<Row>, activations: Bytes) -> Executed {
    let header = StepHeader {
        pipeline: PipelineId(1),
        epoch: Epoch(1),
        term: Term(1),
        dst_incarnation: Incarnation([0; 16]),
        step: StepId(1),
        acked_step: StepId(0),
        deadline_remaining: LONG,
    };
    let (ended_sequences, stage_times) = (Vec::new(), Vec::new());
    let step = Step { header, rows, ended_sequences, stage_times, activations };
    stage.compute(step, false).unwrap()
}

/// Runs rows through all stages, and gives what each of them drew or was refused with.
fn pass(stages: &mut [StubExecutor], rows: Vec<Row>) -> Vec<Result<u32, RowStatus>> {
    let mut executed = Executed {
        step: run(&mut stage(0..1), Vec::new(), Bytes::new()).step,
        values: Vec::new(),
        filled_blocks: 0,
    };
    executed.step.rows = rows;
    for stage in stages {
        let Step { rows, activations, .. } = executed.step;
        executed = run(stage, rows, activations);
    }
    let drawn = |(row, value): (&Row, &RowValue)| match value {
        RowValue::Sampled(sampled) => Ok(sampled.token),
        _ => Err(row.status),
    };
    executed.step.rows.iter().zip(&executed.values).map(drawn).collect()
}

/// The token after 40 tokens of sequence 1, which came in chunks that end at `ends`.
fn answer(stages: &mut [StubExecutor], ends: &[u32]) -> u32 {
    let mut begin = 0;
    for &end in ends {
        let rows = vec![row(1, begin, end - begin, Output::None)];
        assert_eq!(pass(stages, rows), [Err(RowStatus::Ok)]);
        begin = end;
    }
    pass(stages, vec![row(1, begin, 40 - begin, sample())])[0].unwrap()
}

#[test]
fn chunks_neighbours_and_stages_change_nothing() {
    let two = || [stage(0..2), stage(2..4)];
    let whole = answer(&mut two(), &[]);
    for ends in [&[7][..], &[32], &[1, 2, 33], &[39]] {
        assert_eq!(answer(&mut two(), ends), whole, "{ends:?}");
    }
    let mut stages = two();
    let rows = vec![row(3, 0, 5, sample()), row(1, 0, 40, sample())];
    assert_eq!(pass(&mut stages, rows)[1], Ok(whole));
    let cuts: [&[u32]; 4] = [&[0, 4], &[0, 1, 4], &[0, 3, 4], &[0, 1, 2, 3, 4]];
    for cut in cuts {
        let mut stages: Vec<_> = cut.windows(2).map(|ends| stage(ends[0]..ends[1])).collect();
        assert_eq!(answer(&mut stages, &[33]), whole, "cut at {cut:?}");
    }
    let mut wrong = [stage(0..1), stage(1..2), stage(1..2), stage(3..4)];
    assert_ne!(answer(&mut wrong, &[]), whole, "one layer twice, and another not at all");
}

#[test]
fn a_wrong_state_of_any_stage_is_a_wrong_token() {
    let expected = answer(&mut [stage(0..2), stage(2..4)], &[20, 36]);
    // Whether a wrong hash of one layer at one position shows in the token after 4 more.
    let shows = |layer: usize, position| {
        let mut stages = [stage(0..2), stage(2..4)];
        let own = row(1, 0, 36, Output::None);
        pass(&mut stages, vec![own.clone()]);
        stages[layer / 2].keep(&own, layer % 2, position, [7; HASH_BYTES]);
        let drawn = pass(&mut stages, vec![row(1, 36, 4, sample())]);
        drawn[0].unwrap() != expected
    };
    for layer in 0..LAYERS as usize {
        assert!(shows(layer, 35), "the last of layer {layer}");
        // Of each of the others one in 36 is read for each layer and token.
        assert!((0..35).any(|position| shows(layer, position)), "an earlier one of layer {layer}");
    }
    // Sessions refuse what they can see, as they do for an engine.
    let mut stages = [stage(0..2), stage(2..4)];
    assert_eq!(pass(&mut stages, vec![row(1, 36, 4, sample())]), [Err(RowStatus::NeedState)]);
    assert_eq!(pass(&mut stages, vec![row(1, 0, 4, Output::Logits)]), [Err(RowStatus::Invalid)]);
}

#[test]
fn the_first_stage_draws_what_the_last_would() {
    let mut first = stage(0..4);
    let expected = pass(std::slice::from_mut(&mut first), vec![row(1, 0, 9, sample())])[0].unwrap();
    let executed = run(&mut stage(0..4), vec![row(1, 0, 9, Output::State)], Bytes::new());
    let RowValue::State(state) = &executed.values[0] else { panic!("{:?}", executed.values) };
    let draw = row(1, 8, 1, Output::Draw(Box::<SamplingParameters>::default()));
    let drawn = run(&mut first, vec![draw], state.clone());
    let RowValue::Sampled(sampled) = &drawn.values[0] else { panic!("{:?}", drawn.values) };
    assert_eq!(sampled.token, expected);
    assert!(matches!(drawn.step.rows[0].output, Output::Drawn(_)));
    assert!(drawn.step.activations.is_empty());
}

#[test]
fn profiles_are_read_and_wait_as_they_say() {
    let profile: StubProfile = "layer_us=50, row_us=2,head_us=400".parse().unwrap();
    assert_eq!(profile, StubProfile { layer_us: 50, row_us: 2, head_us: 400 });
    assert_eq!(profile.to_string().parse(), Ok(profile));
    assert_eq!("head_us=0".parse(), Ok(StubProfile::default()));
    for text in [
        "",
        "fast",
        "layer_us",
        "layer_us=-1",
        "layer_us=1,layer_us=2",
        "us=1",
        "row_us=1000001",
        "layer_us=1,",
    ] {
        let error = text.parse::<StubProfile>().unwrap_err().to_string();
        assert!(error.contains("layer_us=N"), "{text}: {error}");
    }
    assert_eq!(profile.wait(10, 4, true), Duration::from_micros(10 * 58 + 400));
    assert_eq!(profile.wait(10, 0, true), Duration::from_micros(400), "only drawn");
    assert_eq!(profile.wait(10, 0, false), Duration::ZERO);
    let steps = profile.steps();
    assert_eq!((steps[0].rows, steps[0].layer_ns, steps[0].head_ns), (1, 52_000, 400_000));
    assert_eq!(StubProfile::default().steps()[0].layer_ns, 1, "nothing takes no time");
}
