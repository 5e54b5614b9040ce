//! The known-answer test: proof that the chosen kernels compute, on this machine, what their
//! scalar definition does.

use kernels::Backend;
use proto::ids::KnownAnswer;

use crate::error::RunError;

/// The digest of what the definition gives, once `backend` was seen to give the same.
///
/// # Errors
///
/// [`RunError::KnownAnswer`] if it gives something else: such a worker must not start.
pub(crate) fn prove(backend: Backend) -> Result<KnownAnswer, RunError> {
    let scalar = Backend::by_name("scalar").unwrap_or(backend);
    compare(backend.name(), digest(backend), digest(scalar))
}

fn compare(
    isa: &'static str,
    found: KnownAnswer,
    expected: KnownAnswer,
) -> Result<KnownAnswer, RunError> {
    if found == expected {
        Ok(expected)
    } else {
        Err(RunError::KnownAnswer { isa, found, expected })
    }
}

/// BLAKE3 of the results of every kernel on fixed inputs.
fn digest(backend: Backend) -> KnownAnswer {
    let mut hasher = blake3::Hasher::new();
    kernels::known_answer(backend, &mut |bytes| {
        hasher.update(bytes);
    });
    KnownAnswer(*hasher.finalize().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_backend_proves_itself() {
        let digests: Vec<KnownAnswer> =
            Backend::available().map(|backend| prove(backend).unwrap()).collect();
        assert!(digests.windows(2).all(|pair| pair[0] == pair[1]));
    }

    #[test]
    fn another_answer_is_refused() {
        let error = compare("fast", KnownAnswer([1; 32]), KnownAnswer([2; 32])).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("fast") && text.contains("0101") && text.contains("0202"), "{text}");
    }
}
