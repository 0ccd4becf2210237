//! The `gqla` command.
fn main() {}
