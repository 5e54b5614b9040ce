//! Orders of operators and what becomes of them.

use bytes::Bytes;

use super::{WireError, bounded_text, clipped};
use crate::ids::Incarnation;
use crate::operator::{Drain, DrainState, Drained, Planned};
use crate::{limits, pb};

/// An order as it goes over the wire.
pub fn encode_drain(drain: &Drain) -> pb::DrainRequest {
    pb::DrainRequest {
        cluster_id: drain.cluster_id.clone(),
        worker: drain.worker.clone(),
        incarnation: drain.incarnation.map_or_else(Bytes::new, |own| own.0.to_vec().into()),
        cancel: drain.cancel,
        force: drain.force,
    }
}

/// An order as it arrived.
///
/// # Errors
///
/// [`WireError`] if a name is too long or the incarnation is none.
pub fn decode_drain(drain: pb::DrainRequest) -> Result<Drain, WireError> {
    Ok(Drain {
        cluster_id: bounded_text("cluster_id", drain.cluster_id, limits::NAME_BYTES)?,
        worker: bounded_text("worker", drain.worker, limits::NAME_BYTES)?,
        incarnation: match drain.incarnation.is_empty() {
            true => None,
            false => Some(Incarnation::try_from(&drain.incarnation[..])?),
        },
        cancel: drain.cancel,
        force: drain.force,
    })
}

/// How far a drain is, as it goes over the wire.
pub fn encode_drained(drained: &Drained) -> pb::DrainResponse {
    let state = match drained.state {
        DrainState::Moving => pb::DrainState::Moving,
        DrainState::Ending => pb::DrainState::Ending,
        DrainState::Gone => pb::DrainState::Gone,
        DrainState::InUse => pb::DrainState::InUse,
    };
    pb::DrainResponse {
        incarnation: drained.incarnation.0.to_vec().into(),
        state: state.into(),
        detail: clipped(drained.detail.clone(), limits::DETAIL_BYTES),
        kept: drained.kept,
    }
}

/// How far a drain is, as it arrived.
///
/// # Errors
///
/// [`WireError`] if it says nothing that this version knows.
pub fn decode_drained(drained: pb::DrainResponse) -> Result<Drained, WireError> {
    let state = match drained.state() {
        pb::DrainState::Moving => DrainState::Moving,
        pb::DrainState::Ending => DrainState::Ending,
        pb::DrainState::Gone => DrainState::Gone,
        pb::DrainState::InUse => DrainState::InUse,
        pb::DrainState::Unspecified => {
            let (expected, found) = ("a state of a drain", drained.state.to_string());
            return Err(WireError::Invalid { field: "state", expected, found });
        }
    };
    let incarnation = Incarnation::try_from(&drained.incarnation[..])?;
    let detail = clipped(drained.detail, limits::DETAIL_BYTES);
    Ok(Drained { incarnation, state, detail, kept: drained.kept })
}

/// What came of planning, as it goes over the wire.
pub fn encode_planned(planned: &Planned) -> pb::PlanResponse {
    pb::PlanResponse {
        changes: planned.changes,
        possible: planned.possible,
        reason: clipped(planned.reason.clone(), limits::DETAIL_BYTES),
        tokens_per_s: planned.tokens_per_s,
        before_tokens_per_s: planned.before_tokens_per_s,
        layers_moved: planned.layers_moved,
    }
}

/// What came of planning, as it arrived.
pub fn decode_planned(planned: pb::PlanResponse) -> Planned {
    Planned {
        changes: planned.changes,
        possible: planned.possible,
        reason: clipped(planned.reason, limits::DETAIL_BYTES),
        tokens_per_s: planned.tokens_per_s,
        before_tokens_per_s: planned.before_tokens_per_s,
        layers_moved: planned.layers_moved,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orders_and_answers_survive_the_wire() {
        for incarnation in [None, Some(Incarnation([7; 16]))] {
            let (cluster_id, worker) = ("c".to_owned(), "w".to_owned());
            for (cancel, force) in [(true, false), (false, true)] {
                let (cluster_id, worker) = (cluster_id.clone(), worker.clone());
                let order = Drain { cluster_id, worker, incarnation, cancel, force };
                assert_eq!(decode_drain(encode_drain(&order)), Ok(order));
            }
        }
        for state in [DrainState::Moving, DrainState::Ending, DrainState::Gone, DrainState::InUse] {
            let (incarnation, detail) = (Incarnation([7; 16]), "why".to_owned());
            let kept = state == DrainState::Moving;
            let drained = Drained { incarnation, state, detail, kept };
            assert_eq!(decode_drained(encode_drained(&drained)), Ok(drained));
        }
        let planned = Planned {
            changes: true,
            possible: true,
            reason: "why".to_owned(),
            tokens_per_s: 3.0,
            before_tokens_per_s: 2.0,
            layers_moved: 5,
        };
        assert_eq!(decode_planned(encode_planned(&planned)), planned);
    }

    #[test]
    fn what_arrives_is_not_believed() {
        let long = "w".repeat(limits::NAME_BYTES + 1);
        let drain = |worker: &str, incarnation: &'static [u8]| pb::DrainRequest {
            worker: worker.to_owned(),
            incarnation: Bytes::from_static(incarnation),
            ..pb::DrainRequest::default()
        };
        assert!(matches!(decode_drain(drain(&long, b"")), Err(WireError::TooLarge { .. })));
        assert!(matches!(decode_drain(drain("w", b"short")), Err(WireError::Id(_))));
        let incarnation = vec![7; 16].into();
        let unknown = pb::DrainResponse { incarnation, state: 99, ..pb::DrainResponse::default() };
        assert!(matches!(decode_drained(unknown), Err(WireError::Invalid { .. })));
    }
}
