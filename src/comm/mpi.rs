//! MPI on host memory.
