//! Names and chains.
