//! How many files and sockets this process may have open.

use std::io;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

/// Raises the soft limit of open files to `wanted`, or as far as the hard limit lets; one that is higher
/// stays. Service managers leave 1024, for programs of a kind that this one is not, and a hard limit far
/// above it for those that ask. What may be open now.
///
/// # Errors
///
/// What the system says.
pub fn raise(wanted: u64) -> io::Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    let raised = wanted.min(hard);
    if raised <= soft {
        return Ok(soft);
    }
    setrlimit(Resource::RLIMIT_NOFILE, raised, hard)?;
    Ok(raised)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_is_raised_as_far_as_it_may_be_and_never_lowered() {
        let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        assert_eq!(raise(1).unwrap(), soft);
        let wanted = soft + 1;
        assert_eq!(raise(wanted).unwrap(), wanted.min(hard));
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (wanted.min(hard), hard));
        assert_eq!(raise(u64::MAX).unwrap(), hard);
    }
}
