//! The keys of one cluster in etcd. All values are JSON of this crate's types, except where said.

/// First part of every key; the number is the layout's version.
const ROOT: &str = "/tercet/v1";

/// The keys of the cluster of one name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys {
    cluster: String,
}

impl Keys {
    /// The keys of the cluster called `cluster`.
    pub fn new(cluster: impl Into<String>) -> Self {
        Self { cluster: cluster.into() }
    }

    /// A random id, made once by whoever comes first; scopes every epoch.
    pub fn cluster_id(&self) -> String {
        format!("{ROOT}/{}/cluster-id", self.cluster)
    }

    /// The [`LeaderRecord`](crate::key::LeaderRecord), held under the leading coordinator's lease;
    /// its create-revision is the term.
    pub fn leader(&self) -> String {
        format!("{ROOT}/{}/leader", self.cluster)
    }

    /// Under which every worker has one key, held under its lease.
    pub fn workers(&self) -> String {
        format!("{ROOT}/{}/workers/", self.cluster)
    }

    /// The [`WorkerRecord`](crate::plan::WorkerRecord) of one worker.
    pub fn worker(&self, id: &str) -> String {
        format!("{}{id}", self.workers())
    }

    /// The [`Plan`](crate::plan::Plan); its mod-revision is the epoch of what changed with it.
    pub fn plan(&self) -> String {
        format!("{ROOT}/{}/plan", self.cluster)
    }
}
