//! The overlay driver on a real QEMU with a guard, without a guest: patterns instead of file systems, every order
//! instead of a few, a crash at every await instead of at a named one.

mod crashes;
mod lab;
mod machine;
mod orders;
mod shapes;
