//! Where an engine's weights and threads are: copies for memory nodes, locking, pinning.

use std::{io, thread};

use super::{EngineConfig, EngineError, Placement, StageModel, WeightMemory};
use crate::topology::{Seats, Topology};

/// How many times the weights of a stage are in memory: see [`WeightMemory`].
pub fn weight_copies(config: &EngineConfig) -> u64 {
    match config.placement.weights {
        WeightMemory::Map => 1,
        WeightMemory::Copy => Topology::get().node_count().min(config.threads) as u64,
    }
}

/// The seats of an engine's threads.
pub(super) fn seats(config: &EngineConfig) -> Seats {
    let (topology, Placement { weights, pin, .. }) = (Topology::get(), config.placement);
    if pin {
        Seats::on_cores(topology, config.threads)
    } else if weights == WeightMemory::Copy && topology.node_count() > 1 {
        Seats::on_nodes(topology, config.threads)
    } else {
        Seats::anywhere(config.threads)
    }
}

/// The weights for each memory node of `seats`, where `config` wants them: `model` itself, or copies
/// made by threads that sit there.
///
/// # Errors
///
/// [`EngineError::Copy`], [`EngineError::Seat`], [`EngineError::Lock`].
pub(super) fn place(
    model: StageModel,
    config: &EngineConfig,
    seats: &Seats,
) -> Result<Vec<StageModel>, EngineError> {
    let models = match config.placement.weights {
        WeightMemory::Map => {
            model.populate(|_| {});
            vec![model]
        }
        WeightMemory::Copy => {
            let nodes = seats.node_count();
            // One after the other: the disk or the page cache is what they all read.
            (0..nodes).map(|node| copy_on(&model, seats, node)).collect::<Result<_, _>>()?
        }
    };
    if config.placement.lock {
        for model in &models {
            let bytes = model.weight_bytes();
            model.lock().map_err(|source| EngineError::Lock { bytes, source })?;
        }
    }
    Ok(models)
}

fn copy_on(model: &StageModel, seats: &Seats, node: usize) -> Result<StageModel, EngineError> {
    let copy = || {
        seats.sit(seats.first_on(node)).map_err(EngineError::Seat)?;
        let bytes = model.weight_bytes();
        model.copied().map_err(|source| EngineError::Copy { bytes, source })
    };
    let joined = thread::scope(|scope| {
        let thread = thread::Builder::new().name("weights".into()).spawn_scoped(scope, copy);
        thread.map(thread::ScopedJoinHandle::join)
    });
    let failed = |source| EngineError::Copy { bytes: model.weight_bytes(), source };
    let panicked = |_| failed(io::Error::other("the copying thread panicked"));
    joined.map_err(failed)?.map_err(panicked)?
}
