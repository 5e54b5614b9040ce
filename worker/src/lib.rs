//! Computes its layers: the engine, session checks, the stage service and its links.
