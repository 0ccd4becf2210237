//! A world of one.
