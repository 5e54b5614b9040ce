//! Where the time of a step goes, when somebody asks. The clock is the asker's: the engine has none.

/// Tells the time to [`super::Engine::forward_profiled`].
pub trait Clock: Sync {
    /// Nanoseconds since any fixed moment; never less than before.
    fn now_ns(&self) -> u64;
}

/// What a step did and how long it took. Times are those of all threads together: their sum is the
/// step's duration times its threads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepProfile {
    /// Products with ternary matrices, with the activation function between two of them.
    pub projections_ns: u64,
    /// Storing keys and values, and attention.
    pub attention_ns: u64,
    /// Final norm, logits and sampling.
    pub head_ns: u64,
    /// Embedding, norms, quantisation, RoPE tables and residual additions.
    pub norms_ns: u64,
    /// Waking up, and waiting for other threads.
    pub waiting_ns: u64,
    /// Values of gates that passed a squared ReLU.
    pub gate_values: u64,
    /// Of those, how many became zero.
    pub gate_zeros: u64,
    /// int8 values that entered down-projections.
    pub down_values: u64,
    /// Of those, how many were zero.
    pub down_zeros: u64,
    /// Bytes of matrices and embedding rows that were read, each reading counted once a step.
    pub weight_bytes: u64,
    /// Rows of the head that were left out by their screen.
    pub screened_rows: u64,
    /// Rows of the head that were computed exactly, some perhaps after they were left out.
    pub exact_rows: u64,
}

impl StepProfile {
    /// Adds what another step, or another thread, did.
    pub fn add(&mut self, other: &Self) {
        // Taken apart so that a new field cannot be forgotten.
        let Self {
            projections_ns,
            attention_ns,
            head_ns,
            norms_ns,
            waiting_ns,
            gate_values,
            gate_zeros,
            down_values,
            down_zeros,
            weight_bytes,
            screened_rows,
            exact_rows,
        } = other;
        self.projections_ns += projections_ns;
        self.attention_ns += attention_ns;
        self.head_ns += head_ns;
        self.norms_ns += norms_ns;
        self.waiting_ns += waiting_ns;
        self.gate_values += gate_values;
        self.gate_zeros += gate_zeros;
        self.down_values += down_values;
        self.down_zeros += down_zeros;
        self.weight_bytes += weight_bytes;
        self.screened_rows += screened_rows;
        self.exact_rows += exact_rows;
    }

    /// The time of all threads together.
    pub fn total_ns(&self) -> u64 {
        self.projections_ns + self.attention_ns + self.head_ns + self.norms_ns + self.waiting_ns
    }
}

/// What a thread's time goes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Projections,
    Attention,
    Head,
    Norms,
    Waiting,
}

/// One thread's profile in the making.
#[derive(Debug, Default)]
pub(super) struct Record {
    /// Until when its time is accounted for.
    since_ns: u64,
    /// What there is so far.
    pub(super) profile: StepProfile,
}

impl Record {
    /// Forgets the step before; time counts from `now_ns` on.
    pub(super) fn begin(&mut self, now_ns: u64) {
        *self = Self { since_ns: now_ns, profile: StepProfile::default() };
    }

    /// The time since the last call was spent on `part`.
    pub(super) fn lap(&mut self, part: Part, now_ns: u64) {
        let profile = &mut self.profile;
        let sum = match part {
            Part::Projections => &mut profile.projections_ns,
            Part::Attention => &mut profile.attention_ns,
            Part::Head => &mut profile.head_ns,
            Part::Norms => &mut profile.norms_ns,
            Part::Waiting => &mut profile.waiting_ns,
        };
        *sum += now_ns.saturating_sub(self.since_ns);
        self.since_ns = now_ns;
    }
}
