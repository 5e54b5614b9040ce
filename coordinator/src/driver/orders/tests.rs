//! Who takes orders: the coordinator that leads, of the cluster that is meant.

use std::sync::Arc;
use std::time::Duration;

use node::membership::Memory;
use proto::ids::Incarnation;
use proto::keys::Keys;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::driver::DriverHandle;
use crate::driver::control::tests::config;

fn order(cluster_id: &str, incarnation: Option<Incarnation>) -> Drain {
    let (cluster_id, worker) = (cluster_id.to_owned(), "w".to_owned());
    Drain { cluster_id, worker, incarnation, cancel: false, force: false }
}

/// What a driver says to somebody who asks what the planner would be asked, once it is `wanted`.
async fn until(
    handle: &DriverHandle,
    wanted: impl Fn(&Result<Problem, OrderError>) -> bool,
) -> Result<Problem, OrderError> {
    let asked = async {
        loop {
            let answer = handle.question(String::new()).await;
            if wanted(&answer) {
                return answer;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), asked).await.expect("it says something else")
}

#[tokio::test(start_paused = true)]
async fn only_the_leader_of_the_cluster_that_is_meant_takes_orders() {
    let registry = Memory::new();
    let stop = CancellationToken::new();
    let mut runs = JoinSet::new();
    let mut start = || {
        let (config, keys) = (config(Duration::ZERO, Duration::ZERO), Keys::new("c"));
        let membership = Arc::new(registry.another());
        let (driver, handle) = Driver::new(config, keys, membership, stop.clone());
        runs.spawn(driver.run(CancellationToken::new().drop_guard()));
        handle
    };
    let first = start();
    let problem = until(&first, Result::is_ok).await.unwrap();
    assert!(problem.workers.is_empty());
    let unknown = first.drain(order("1", None)).await.unwrap_err();
    assert_eq!(unknown.to_string(), "there is no worker \"w\"; there are no workers");
    // Of an earlier start nothing is known, so it is gone.
    let earlier = Incarnation([7; 16]);
    let gone = first.drain(order("", Some(earlier))).await.unwrap();
    assert_eq!((gone.state, gone.incarnation), (DrainState::Gone, earlier));
    let elsewhere = first.drain(order("2", None)).await.unwrap_err();
    assert_eq!(elsewhere.to_string(), "this coordinator is of cluster \"1\", \"2\" was meant");
    assert!(first.plan("2".to_owned(), false).await.is_err());
    let planned = first.plan("1".to_owned(), false).await.unwrap();
    assert!(!planned.possible && planned.reason.contains("no worker"), "{planned:?}");

    let second = start();
    let knows = |answer: &Result<Problem, OrderError>| {
        matches!(answer, Err(OrderError::NotLeading { leader: Some(_) }))
    };
    let refused = until(&second, knows).await.unwrap_err();
    assert_eq!(refused.to_string(), "this coordinator does not lead; the one at c:1 does");
    assert_eq!(second.drain(order("", None)).await.unwrap_err(), refused);
    assert_eq!(second.plan(String::new(), true).await.unwrap_err(), refused);
    stop.cancel();
    while let Some(end) = runs.join_next().await {
        end.unwrap();
    }
    assert_eq!(first.drain(order("", None)).await, Err(OrderError::Stopping));
}
