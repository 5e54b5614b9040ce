//! Tests of the safetensors reader: each way a header can lie, and bytes that mean nothing.

use super::*;
use proptest::prelude::*;

/// A file with this header and this many data bytes.
fn file(header: &str, data_bytes: usize) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(header.as_bytes());
    bytes.resize(bytes.len() + data_bytes, 7);
    bytes
}

/// The error's whole chain.
fn refusal(bytes: &[u8]) -> String {
    let error = Table::parse(bytes).expect_err("the file is bad");
    let source = std::error::Error::source(&error).map(|e| format!(": {e}")).unwrap_or_default();
    format!("{error}{source}")
}

#[test]
fn a_written_header_reads_back() {
    let tensors = [
        NewTensor { name: "q", dtype: Dtype::U8, shape: vec![128] },
        NewTensor { name: "norm", dtype: Dtype::F32, shape: vec![5] },
        NewTensor { name: "embed", dtype: Dtype::Bf16, shape: vec![3, 2] },
    ];
    let metadata = BTreeMap::from([("a \"b\"".to_owned(), "c".to_owned())]);
    let mut bytes = header(&tensors, &metadata, 64);
    assert_eq!(bytes.len() % 64, 0);
    let data_start = bytes.len();
    bytes.resize(data_start + 128 + 20 + 12, 0);
    let table = Table::parse(&bytes).unwrap();
    assert_eq!(table.metadata, metadata);
    assert_eq!(table.data_start, data_start);
    assert_eq!(table.tensors["q"].range, data_start..data_start + 128);
    assert_eq!(table.tensors["norm"].range, data_start + 128..data_start + 148);
    assert_eq!(table.tensors["embed"].shape, [3, 2]);
    assert_eq!(table.tensors["embed"].dtype, Dtype::Bf16);
}

/// Entries without the brace that closes them: whoever reads to the end misses it.
fn many_entries(count: usize) -> String {
    (0..count).map(|number| format!("\"{number}\":[0],")).collect()
}

#[test]
fn metadata_that_is_no_text_is_passed_over() {
    let values = r#"{"a":"b","n":1,"x":-1,"f":0.5,"t":true,"z":null,"l":[[]],"m":{"c":{}}}"#;
    let table = Table::parse(&file(&format!(r#"{{"__metadata__":{values}}}"#), 0)).unwrap();
    assert_eq!(table.metadata, BTreeMap::from([("a".to_owned(), "b".to_owned())]));
    assert!(Table::parse(&file(r#"{"__metadata__":null}"#, 0)).unwrap().metadata.is_empty());
}

#[test]
fn every_lie_is_named() {
    let t = |shape: &str, from: u64, to: u64| {
        format!(r#"{{"dtype":"U8","shape":{shape},"data_offsets":[{from},{to}]}}"#)
    };
    let one = |name: &str, entry: &str| format!(r#"{{"{name}":{entry}}}"#);
    let two = |a: &str, b: &str| format!(r#"{{"a":{a},"b":{b}}}"#);
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (vec![], "truncated: the file has 0 bytes, its header needs 8"),
        (b"version https://git-lfs.github.com/spec/v1\noid".to_vec(), "git-lfs pointer"),
        (u64::MAX.to_le_bytes().to_vec(), "the header's length is 18446744073709551615"),
        (100u64.to_le_bytes().to_vec(), "truncated: the file has 8 bytes, its header needs 108"),
        (file("[]", 0), "not a table of tensors: invalid type"),
        (file("{\"a\":", 0), "not a table of tensors: EOF"),
        (file(&"[".repeat(5000), 0), "not a table of tensors"),
        (file(&one("a", &t("[4]", 0, 4)), 3), "the data has 3 bytes, the tensors need 4"),
        (file(&one("a", &t("[4]", 0, 4)), 5), "the data has 5 bytes, the tensors need 4"),
        (file(&one("a", &t("[4]", 1, 5)), 5), "begins at byte 1 of the data, expected 0"),
        (file(&one("a", &t("[5]", 0, 4)), 4), "has 4 bytes, its shape [5] needs 5"),
        (file(&one("a", &t("[4]", 4, 0)), 0), "begins at byte 4"),
        (file(&one("a", &t("[0]", 0, 1)), 1), "has 1 bytes, its shape [0] needs 0"),
        (
            file(&one("a", &t("[4294967296,4294967296]", 0, 4)), 4),
            "impossible shape [4294967296, 4294967296]",
        ),
        (file(&one("a", &t("[1,1,1,1,1,1,1,1,1]", 0, 1)), 1), "impossible shape"),
        (file(&two(&t("[4]", 0, 4), &t("[4]", 2, 6)), 6), "begins at byte 2 of the data"),
        (file(&two(&t("[4]", 0, 4), &t("[4]", 0, 4)), 4), "begins at byte 0 of the data"),
        (file(r#"{"a":{"dtype":"I4","shape":[1],"data_offsets":[0,1]}}"#, 1), "dtype I4"),
        (file(r#"{"a":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}"#, 1), "invalid value"),
        (file(r#"{"a":{"shape":[1],"data_offsets":[0,1]}}"#, 1), "missing field `dtype`"),
        (file(&format!(r#"{{"a":{0},"a":{0}}}"#, t("[1]", 0, 1)), 1), "tensor a occurs twice"),
        (file(r#"{"__metadata__":3}"#, 0), "invalid type"),
        (file(r#"{"__metadata__":{"a":"b"},"__metadata__":null}"#, 0), "__metadata__ occurs twice"),
        // Not built before it is counted: of a hundred thousand, the 4097th is the last that is read.
        (
            file(&format!(r#"{{"__metadata__":{{{}}}"#, many_entries(100_000)), 0),
            "too many entries",
        ),
        (
            file(&format!(r#"{{"__metadata__":{{"a":"{}"}}}}"#, "x".repeat(METADATA_BYTES_MAX)), 0),
            "__metadata__ has more than 4194304 bytes",
        ),
        (
            file(&one("a", &t(&format!("[{}1]", "1,".repeat(100_000)), 0, 1)), 1),
            "impossible shape [1, 1, 1, 1, 1, 1, 1, 1, 1]",
        ),
    ];
    for (bytes, expected) in cases {
        let text = refusal(&bytes);
        assert!(text.contains(expected), "{text:?} should say {expected:?}");
    }
}

#[test]
fn what_every_reader_takes_is_taken() {
    let header = r#"{"__metadata__":{"a":1,"b":"c","d":null},
        "empty":{"dtype":"F32","shape":[0,4],"data_offsets":[4,4]},
        "ids":{"dtype":"I64","shape":[1],"data_offsets":[4,12],"extra":true},
        "one":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}"#;
    let table = Table::parse(&file(header, 12)).unwrap();
    assert_eq!(table.metadata, BTreeMap::from([("b".to_owned(), "c".to_owned())]));
    assert_eq!(table.tensors["ids"].dtype.name(), "I64");
    assert_eq!(table.tensors["ids"].range.len(), 8);
    assert_eq!(table.tensors["empty"].range.len(), 0);
    assert_eq!(Table::parse(&file(r#"{"__metadata__":null}"#, 0)).unwrap().tensors.len(), 0);
}

#[test]
fn too_many_tensors_are_refused() {
    let entries: Vec<String> = (0..=TENSORS_MAX)
        .map(|i| format!(r#""t{i}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{}]}}"#, i + 1))
        .collect();
    let bytes = file(&format!("{{{}}}", entries.join(",")), TENSORS_MAX + 1);
    assert!(refusal(&bytes).contains("more than 65536 tensors"));
}

proptest! {
    #[test]
    fn anything_is_a_table_or_an_error(
        header in r#"\{("[ab]":\{"dtype":"(U8|F32)","shape":\[[0-9]{1,3}(,[0-9]{1,20})?\],"data_offsets":\[[0-9]{1,20},[0-9]{1,3}\]\}){0,3}\}"#,
        data in 0usize..200,
    ) {
        let bytes = file(&header, data);
        if let Ok(table) = Table::parse(&bytes) {
            for tensor in table.tensors.values() {
                prop_assert!(tensor.range.end <= bytes.len());
            }
        }
    }
}
