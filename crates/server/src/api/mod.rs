//! The wire types: what requests and answers look like. Schemas of the OpenAPI document come from here.

pub(crate) mod chat;
pub(crate) mod common;
pub(crate) mod completions;
pub(crate) mod control;
pub(crate) mod responses;
pub(crate) mod tokenize;
