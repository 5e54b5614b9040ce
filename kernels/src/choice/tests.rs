//! What is chosen when backends are missing or wrong, and that the proof knows every operation.

use super::*;
use crate::backend::NotFinite;

/// What an operation yields that does nothing.
pub(crate) trait Nothing {
    fn nothing() -> Self;
}

impl Nothing for () {
    fn nothing() -> Self {}
}

impl Nothing for f32 {
    fn nothing() -> Self {
        0.0
    }
}

impl Nothing for usize {
    fn nothing() -> Self {
        0
    }
}

impl Nothing for Result<(f32, i32), NotFinite> {
    fn nothing() -> Self {
        Ok((0.0, 0))
    }
}

/// Names of the functions behind every `dispatch!` of the door.
fn operations() -> Vec<&'static str> {
    let door = include_str!("../backend.rs");
    let calls = door.split("dispatch!(self, ").skip(1);
    calls.filter_map(|call| call.split_once(", ")?.1.split('(').next()).collect()
}

fn proof() -> Proof {
    Proof::new(Backend(Kind::Scalar))
}

#[test]
fn no_backend_of_this_machine_is_wrong() {
    for (name, refusal) in &Backend::choose().refused {
        assert!(matches!(refusal, Refusal::Lacks(_)), "{name}: {refusal}");
    }
}

#[test]
fn the_proof_misses_no_operation() {
    let (proof, operations) = (proof(), operations());
    assert!(operations.len() >= 18, "{operations:?}");
    for operation in operations {
        let found = proof.check(Backend(Kind::Without(operation)));
        assert!(found.is_err(), "{operation} is not among the checks of proof.rs");
    }
    assert_eq!(proof.check(Backend(Kind::Without("anything else"))), Ok(()));
}

#[test]
fn a_wrong_backend_is_refused_and_the_next_is_taken() {
    let scalar = Backend(Kind::Scalar);
    let candidates = vec![
        ("scalar", Ok(scalar)),
        ("good", Ok(Backend(Kind::Without("nothing")))),
        ("absent", Err(Refusal::Lacks("avx1024"))),
        ("wrong", Ok(Backend(Kind::Without("dot")))),
    ];
    let proof = proof();
    let choice = choose_among(candidates, |backend| proof.check(backend));
    assert_eq!(choice.backend, Backend(Kind::Without("nothing")));
    assert_eq!(choice.proven, [scalar, choice.backend]);
    assert_eq!(
        choice.refused,
        [("absent", Refusal::Lacks("avx1024")), ("wrong", Refusal::Differs("sums and norms"))]
    );
    assert_eq!(
        choice.to_string(),
        "flawed is all that this CPU runs; absent: this CPU lacks avx1024; wrong: refused, \
         its results for sums and norms differ from the definition"
    );
}

#[test]
fn the_definition_is_left_when_all_others_are_wrong() {
    let wrong = Backend(Kind::Without("ternary"));
    let candidates = vec![("scalar", Ok(Backend(Kind::Scalar))), ("wrong", Ok(wrong))];
    let proof = proof();
    let choice = choose_among(candidates, |backend| proof.check(backend));
    assert_eq!(choice.backend, Backend(Kind::Scalar));
}

#[test]
fn a_refusal_says_what_is_missing() {
    assert_eq!(Backend::named("mmx"), Err(Refusal::Unknown));
    for (name, architecture) in ALL {
        match Backend::named(name) {
            Ok(backend) => assert_eq!(backend.name(), name),
            Err(Refusal::Architecture(found)) => {
                assert_eq!(found, architecture);
                assert_ne!(found, std::env::consts::ARCH);
            }
            Err(refusal) => assert!(matches!(refusal, Refusal::Lacks(_)), "{name}: {refusal}"),
        }
    }
}
