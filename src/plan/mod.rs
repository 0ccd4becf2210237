//! The cost model and the choice of path.
