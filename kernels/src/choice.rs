//! Which backend runs: what this CPU has, what each backend proved of itself, and how that is said.

use std::fmt;
use std::sync::OnceLock;

#[cfg(target_arch = "aarch64")]
use crate::aarch64::neon::{Neon, NeonDotprod};
use crate::backend::{Backend, Kind};
use crate::proof::Proof;
use crate::speed::Mix;
#[cfg(target_arch = "x86_64")]
use crate::x86_64::{amx::Amx, avx2::Avx2, avx512::Avx512, avxvnni::AvxVnni};

/// Every backend that there is, narrowest first, and the architecture it needs (any, if it is empty).
const ALL: [(&str, &str); 7] = [
    ("scalar", ""),
    ("avx2", "x86_64"),
    ("avxvnni", "x86_64"),
    ("avx512", "x86_64"),
    ("amx", "x86_64"),
    ("neon", "aarch64"),
    ("neon-dotprod", "aarch64"),
];

/// The backend to use and why it is not another one: see [`Backend::choose`].
#[derive(Clone, Debug)]
pub struct Choice {
    /// For each operation and number of rows the fastest backend that proved itself on this CPU.
    pub backend: Backend,
    /// Every backend that did, narrowest first.
    pub proven: Vec<Backend>,
    /// The other backends of this architecture, narrowest first, and why they are not used.
    pub refused: Vec<(&'static str, Refusal)>,
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.backend.0 {
            Kind::Mixed(mix) => write!(f, "fastest on this CPU: {mix}")?,
            _ => write!(f, "{} is all that this CPU runs", self.backend.name())?,
        }
        for (name, refusal) in &self.refused {
            write!(f, "; {name}: {refusal}")?;
        }
        Ok(())
    }
}

/// Why a backend is not used.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Refusal {
    /// No backend has this name.
    Unknown,
    /// It is for CPUs of another architecture, which is named.
    Architecture(&'static str),
    /// This CPU or its operating system lacks an instruction set, which is named.
    Lacks(&'static str),
    /// It computes something else than the scalar definition; the operation is named. The CPU, the
    /// compiler or the kernel is wrong.
    Differs(&'static str),
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown => write!(f, "there are no such kernels"),
            Self::Architecture(architecture) => write!(f, "it needs a CPU of {architecture}"),
            Self::Lacks(feature) => write!(f, "this CPU lacks {feature}"),
            Self::Differs(operation) => {
                write!(f, "refused, its results for {operation} differ from the definition")
            }
        }
    }
}

impl std::error::Error for Refusal {}

/// Choosing one.
impl Backend {
    /// Finds out what this CPU has, has every backend compute known answers beside the scalar
    /// definition, and measures which of those that give the same bits is the fastest at what. Takes up
    /// to a tenth of a second the first time; later calls give what the first one found.
    pub fn choose() -> &'static Choice {
        static CHOICE: OnceLock<Choice> = OnceLock::new();
        CHOICE.get_or_init(|| {
            let proof = Proof::new(Self(Kind::Scalar));
            let mut choice = choose_among(candidates(), |backend| proof.check(backend));
            if choice.proven.len() > 1 {
                let mix = Mix::measure(&choice.proven, choice.backend);
                // Once in the life of a process.
                choice.backend = Self(Kind::Mixed(Box::leak(Box::new(mix))));
            }
            choice
        })
    }

    /// The fastest backend of this CPU for each operation.
    pub fn detect() -> Self {
        Self::choose().backend
    }

    /// Every backend that this CPU can run, narrowest first. Tests and benches walk this list.
    pub fn available() -> impl Iterator<Item = Self> {
        Self::choose().proven.iter().copied()
    }

    /// The backend of this name, if there is one and this CPU can run it.
    pub fn by_name(name: &str) -> Option<Self> {
        Self::named(name).ok()
    }

    /// The backend of this name; `auto` is what [`Self::detect`] gives.
    ///
    /// # Errors
    ///
    /// A [`Refusal`] that says why it cannot be had here.
    pub fn named(name: &str) -> Result<Self, Refusal> {
        let choice = Self::choose();
        if name == "auto" {
            return Ok(choice.backend);
        }
        if let Some(backend) = choice.proven.iter().find(|backend| backend.name() == name) {
            return Ok(*backend);
        }
        if let Some((_, refusal)) = choice.refused.iter().find(|(refused, _)| *refused == name) {
            return Err(refusal.clone());
        }
        match ALL.iter().find(|(known, _)| *known == name) {
            Some((_, architecture)) => Err(Refusal::Architecture(architecture)),
            None => Err(Refusal::Unknown),
        }
    }
}

/// A backend, or why there is none, by its name.
type Candidate = (&'static str, Result<Backend, Refusal>);

/// The backends of this architecture, narrowest first.
fn candidates() -> Vec<Candidate> {
    let kind_of = |name| match name {
        "scalar" => Ok(Kind::Scalar),
        #[cfg(target_arch = "x86_64")]
        "avx2" => Avx2::detect().map(Kind::Avx2),
        #[cfg(target_arch = "x86_64")]
        "avxvnni" => AvxVnni::detect().map(Kind::AvxVnni),
        #[cfg(target_arch = "x86_64")]
        "avx512" => Avx512::detect().map(Kind::Avx512),
        #[cfg(target_arch = "x86_64")]
        "amx" => Amx::detect().map(Kind::Amx),
        #[cfg(target_arch = "aarch64")]
        "neon" => Neon::detect().map(Kind::Neon),
        #[cfg(target_arch = "aarch64")]
        "neon-dotprod" => NeonDotprod::detect().map(Kind::NeonDotprod),
        _ => unreachable!("{name} is listed for this architecture"),
    };
    ALL.iter()
        .filter(|(_, architecture)| ["", std::env::consts::ARCH].contains(architecture))
        .map(|(name, _)| (*name, kind_of(name).map(Backend).map_err(Refusal::Lacks)))
        .collect()
}

/// The last of `candidates`, which begin with the definition itself, that passes `check`; an error
/// of `check` is the operation that failed.
fn choose_among(
    candidates: Vec<Candidate>,
    check: impl Fn(Backend) -> Result<(), &'static str>,
) -> Choice {
    let scalar = Backend(Kind::Scalar);
    let mut choice = Choice { backend: scalar, proven: Vec::new(), refused: Vec::new() };
    for (name, candidate) in candidates {
        let proven = candidate.and_then(|backend| match check(backend) {
            Ok(()) => Ok(backend),
            Err(operation) => Err(Refusal::Differs(operation)),
        });
        match proven {
            Ok(backend) => choice.proven.push(backend),
            Err(refusal) => choice.refused.push((name, refusal)),
        }
    }
    choice.backend = choice.proven.last().copied().unwrap_or(scalar);
    choice
}

#[cfg(test)]
pub(crate) mod tests;
