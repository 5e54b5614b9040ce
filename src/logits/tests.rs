//! However the work is cut, the bits are the same. The bundled model's whole matrix is in `tests/`.

use super::*;
use proto::plan::KvType;

fn bits(store: &Store, options: &LogitsOptions, tokens: &[u32]) -> Vec<Vec<u32>> {
    let rows = logits(store, options, tokens).unwrap();
    rows.iter().map(|row| row.iter().map(|value| value.to_bits()).collect()).collect()
}

#[test]
fn cuts_and_company_change_no_bit() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    model::synth(&"3x64x128x2x1x96".parse().unwrap(), 5, &path, &mut |_| {}).unwrap();
    let store = Store::open(&path).unwrap();
    let tokens: Vec<u32> = (0..40).map(|i| i * 29 % 96).collect();
    for kv_type in [KvType::F16, KvType::F32] {
        let plain = LogitsOptions {
            pipeline: PipelineOptions { threads: 1, kv_type, ..PipelineOptions::default() },
            ..LogitsOptions::default()
        };
        let want = bits(&store, &plain, &tokens);
        assert_eq!((want.len(), want[0].len()), (40, 96));
        let mut cuts = vec![];
        for (stages, chunk, among) in
            [(1, Some(1), 0), (3, None, 0), (2, Some(7), 0), (1, Some(32), 3), (3, Some(5), 4)]
        {
            let pipeline = PipelineOptions { stages, threads: 2, ..plain.pipeline };
            cuts.push(LogitsOptions { pipeline, chunk, among, seed: 3 });
        }
        for options in cuts {
            assert!(bits(&store, &options, &tokens) == want, "{options:?}");
        }
    }
}

#[test]
fn what_cannot_be_computed_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    model::synth(&"1x64x128x2x1x96".parse().unwrap(), 5, &path, &mut |_| {}).unwrap();
    let store = Store::open(&path).unwrap();
    let plain = LogitsOptions::default();
    let refused =
        |options: &LogitsOptions, tokens: &[u32]| logits(&store, options, tokens).unwrap_err();
    assert!(matches!(refused(&plain, &[]), LogitsError::NoTokens));
    assert!(matches!(refused(&plain, &[96]), LogitsError::Token { token: 96, vocab: 96 }));
    assert!(matches!(refused(&plain, &vec![0; 5000]), LogitsError::Context { .. }));
    let nothing = LogitsOptions { chunk: Some(0), ..plain };
    assert!(matches!(refused(&nothing, &[1]), LogitsError::Chunk));
}

#[test]
fn company_is_the_same_for_the_same_seed() {
    let draw = |seed| {
        let mut random = Random(seed);
        (0..100).map(|_| random.below(10)).collect::<Vec<_>>()
    };
    assert_eq!(draw(1), draw(1));
    assert_ne!(draw(1), draw(2));
    assert!(draw(1).iter().all(|&number| number < 10));
    let mut items: Vec<u32> = (0..50).collect();
    Random(9).shuffle(&mut items);
    assert_ne!(items, (0..50).collect::<Vec<_>>());
    items.sort_unstable();
    assert_eq!(items, (0..50).collect::<Vec<_>>(), "a shuffle loses nothing");
}
