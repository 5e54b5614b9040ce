//! Says what a worker that holds no stage waits for, once for every change.

use std::sync::Arc;
use std::time::Duration;

use node::TaskError;
use node::membership::Membership;
use proto::keys::Keys;
use tokio_util::sync::CancellationToken;

use crate::service::Service;

/// How often it is looked whether the worker holds a stage, and how long it must have held none: in a
/// start or after a failure it gets one sooner.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);

/// Looks at the worker between two looks at the registry for who leads: hundreds of workers may stand
/// by, and each look is a read of etcd.
const LOOKS_PER_LEADER: u32 = 30;

/// Runs until `stop` fires.
pub(crate) async fn tell(
    service: Arc<Service>,
    membership: Arc<dyn Membership>,
    keys: Keys,
    stop: CancellationToken,
) -> Result<(), TaskError> {
    let mut said = None;
    let mut looks: u32 = 0;
    while stop.run_until_cancelled(tokio::time::sleep(LOOK_INTERVAL)).await.is_some() {
        let held = service.describe().held;
        if let Some(prepare) = held {
            looks = 0;
            let layers = &prepare.stages[prepare.stage as usize].layers;
            let epoch = prepare.epoch;
            let now = format!("holds layers {}..{} of epoch {epoch}", layers.start, layers.end);
            say(&mut said, now);
            continue;
        }
        looks += 1;
        if looks % LOOKS_PER_LEADER != 1 {
            continue;
        }
        let leader = keys.leader();
        let Some(found) = stop.run_until_cancelled(membership.list(&leader)).await else { break };
        let leads = match found {
            Ok(found) => found.entries.iter().any(|entry| entry.key == leader),
            // That etcd is away is said by whoever speaks to it.
            Err(_) => continue,
        };
        say(&mut said, waits_for(leads).to_owned());
    }
    Ok(())
}

/// What a worker without a stage waits for.
fn waits_for(somebody_leads: bool) -> &'static str {
    match somebody_leads {
        true => "stands by: the coordinator has no stage for it now",
        false => "stands by: no coordinator leads this cluster",
    }
}

fn say(said: &mut Option<String>, now: String) {
    if said.as_ref() != Some(&now) {
        tracing::info!(target: "tercet::waiting", "{now}");
        *said = Some(now);
    }
}
