//! The routes, one file a family.

pub(crate) mod chat;
pub(crate) mod completions;
pub(crate) mod control;
pub(crate) mod misc;
pub(crate) mod responses;
pub(crate) mod tokenize;
