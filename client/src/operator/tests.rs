//! Where orders go, and that waiting for them ends.

use proto::status::{PipelineStatus, Waiting};

use super::*;

fn endpoint() -> Endpoint {
    "rack1:7420".parse().unwrap()
}

#[test]
fn orders_go_where_the_coordinator_says_and_a_standby_says_who_leads() {
    let said = |admin: Option<&str>| {
        let admin = admin.map(str::to_owned);
        let found = admin_of(&ClusterStatus { admin, ..ClusterStatus::default() }, &endpoint());
        found.map(|found| found.to_string()).map_err(|error| error.to_string())
    };
    assert_eq!(said(Some("rack1:7421")), Ok("rack1:7421".to_owned()));
    assert_eq!(said(Some("0.0.0.0:7421")), Ok("rack1:7421".to_owned()));
    assert!(said(None).unwrap_err().contains("start it with --admin"));
    assert!(said(Some("\u{1b}[2J")).unwrap_err().contains("no address"));
    let detail = "this coordinator does not lead; the one at rack2:7420 does".to_owned();
    let waiting = Some(Waiting { cause: WaitCause::Leadership, detail: detail.clone() });
    let standby =
        ClusterStatus { admin: Some("rack1:7421".into()), waiting, ..ClusterStatus::default() };
    let error = admin_of(&standby, &endpoint()).unwrap_err().to_string();
    assert_eq!(error, format!("{detail} (coordinator at rack1:7420)"));
}

#[test]
fn a_pipeline_that_is_not_active_is_being_changed() {
    let plan = |states: &[&str]| PlanStatus {
        pipelines: states
            .iter()
            .map(|&state| PipelineStatus { id: 3, state: state.into(), ..Default::default() })
            .collect(),
        reason: String::new(),
    };
    assert_eq!(under_way(&plan(&["active", "active"])), None);
    for state in ["preparing", "activating", "switching", "stopped"] {
        let change = under_way(&plan(&["active", state]));
        assert_eq!(change, Some(format!("pipeline 3 is {state}")));
    }
}

#[tokio::test(start_paused = true)]
async fn waiting_survives_a_coordinator_that_is_away_and_ends_with_its_time_or_an_error() {
    let unreachable =
        |refusal| ClientError::Order { endpoint: endpoint(), refusal, message: "so".to_owned() };
    let end = || Instant::now() + Duration::from_secs(10);
    let mut progress = Progress::stderr();
    let mut looks = 0;
    let found = until(end(), &mut progress, async || {
        looks += 1;
        match looks {
            1 => Err(unreachable(crate::Refusal::Unavailable)),
            2 => Ok(Err("a while".to_owned())),
            _ => Ok(Ok(7)),
        }
    });
    assert_eq!(found.await.unwrap(), Ok(7));
    let never = until::<()>(end(), &mut progress, async || Ok(Err("for ever".to_owned())));
    assert_eq!(never.await.unwrap(), Err("for ever".to_owned()));
    let refused =
        until::<()>(end(), &mut progress, async || Err(unreachable(crate::Refusal::Conflict)));
    assert_eq!(refused.await.unwrap_err().to_string(), "so (coordinator at rack1:7420)");
}
