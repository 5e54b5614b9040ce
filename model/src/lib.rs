//! What a model is on disk: import, store, shards, memory maps, shapes, ids.
