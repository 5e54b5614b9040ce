//! The connection to where a coordinator takes orders.

use std::time::Duration;

use proto::convert;
use proto::ids::Incarnation;
use proto::limits::CLIENT_MESSAGE_BYTES;
use proto::operator::{Drain, Drained, Planned};
use proto::pb;
use proto::pb::operator_client::OperatorClient;
use proto::status::ClusterStatus;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use crate::grpc::{is_strange, open, said};
use crate::{ClientError, Endpoint};

/// How long an answer may take that needs nothing but the coordinator's memory.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a plan may take to be decided: longer than the coordinator gives it, so that it says why.
const PLAN_TIMEOUT: Duration = Duration::from_secs(80);

/// A connection to a coordinator's admin address. Cheap to clone; clones share the connection.
#[derive(Clone, Debug)]
pub struct Operator {
    endpoint: Endpoint,
    /// The cluster that is meant; empty: whichever is there.
    cluster_id: String,
    client: OperatorClient<Channel>,
}

impl Operator {
    /// Connects to where the coordinator of this cluster takes orders; an empty id is any cluster's.
    ///
    /// # Errors
    ///
    /// [`ClientError::Unreachable`] if nobody listens there.
    pub async fn at(endpoint: &Endpoint, cluster_id: String) -> Result<Self, ClientError> {
        let client = OperatorClient::new(open(endpoint).await?)
            .max_decoding_message_size(CLIENT_MESSAGE_BYTES)
            .max_encoding_message_size(CLIENT_MESSAGE_BYTES);
        Ok(Self { endpoint: endpoint.clone(), cluster_id, client })
    }

    /// The cluster as the coordinator sees it.
    ///
    /// # Errors
    ///
    /// If the coordinator does not say, or not in time.
    pub async fn status(&self) -> Result<ClusterStatus, ClientError> {
        let question = within(ANSWER_TIMEOUT, pb::StatusRequest {});
        let answer = self.client.clone().status(question).await;
        Ok(convert::decode_status(self.answer(answer)?))
    }

    /// Orders a worker to be used no more, with `force` also where nobody can take its place, and tells
    /// how far that is. Without an incarnation the process that is there now is meant.
    ///
    /// # Errors
    ///
    /// If the coordinator does not take the order, or does not answer in time.
    pub async fn drain(
        &self,
        worker: &str,
        incarnation: Option<Incarnation>,
        force: bool,
    ) -> Result<Drained, ClientError> {
        let (cluster_id, worker) = (self.cluster_id.clone(), worker.to_owned());
        self.order(&Drain { cluster_id, worker, incarnation, cancel: false, force }).await
    }

    /// Orders that a worker may be used again, and tells how it is.
    ///
    /// # Errors
    ///
    /// As [`drain`](Self::drain), and if it is told to end already.
    pub async fn cancel_drain(&self, worker: &str) -> Result<Drained, ClientError> {
        let (cluster_id, worker) = (self.cluster_id.clone(), worker.to_owned());
        let incarnation = None;
        self.order(&Drain { cluster_id, worker, incarnation, cancel: true, force: false }).await
    }

    async fn order(&self, order: &Drain) -> Result<Drained, ClientError> {
        let order = within(ANSWER_TIMEOUT, convert::encode_drain(order));
        let answer = self.client.clone().drain(order).await;
        convert::decode_drained(self.answer(answer)?)
            .map_err(|source| ClientError::Wire { endpoint: self.endpoint.clone(), source })
    }

    /// Orders a plan, with `least_gain` one that is carried out only for the gain that the coordinator's
    /// settings ask for; returns when it is decided.
    ///
    /// # Errors
    ///
    /// As [`drain`](Self::drain).
    pub async fn plan(&self, least_gain: bool) -> Result<Planned, ClientError> {
        let cluster_id = self.cluster_id.clone();
        let order = within(PLAN_TIMEOUT, pb::PlanRequest { cluster_id, least_gain });
        let answer = self.client.clone().plan(order).await;
        Ok(convert::decode_planned(self.answer(answer)?))
    }

    /// What the coordinator's planner would be asked now, as JSON of its version.
    ///
    /// # Errors
    ///
    /// As [`drain`](Self::drain).
    pub async fn question(&self) -> Result<String, ClientError> {
        let cluster_id = self.cluster_id.clone();
        let question = within(ANSWER_TIMEOUT, pb::QuestionRequest { cluster_id });
        let answer = self.client.clone().question(question).await;
        Ok(self.answer(answer)?.problem_json)
    }

    fn answer<T>(&self, answer: Result<tonic::Response<T>, Status>) -> Result<T, ClientError> {
        let endpoint = self.endpoint.clone();
        match answer {
            Ok(response) => Ok(response.into_inner()),
            // A connection that broke is made again, and then says what it says.
            Err(status) if status.code() != Code::Unavailable && is_strange(&status) => {
                Err(ClientError::NoOrders { endpoint })
            }
            Err(status) => {
                let (refusal, message) = (status.code().into(), said(&status));
                Err(ClientError::Order { endpoint, refusal, message })
            }
        }
    }
}

fn within<T>(timeout: Duration, message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(timeout);
    request
}
