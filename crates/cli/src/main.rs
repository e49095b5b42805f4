//! The `bitfast` command.
fn main() {}
