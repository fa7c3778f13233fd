//! What the benches share: the requests, the contenders with their floors, and the table.

pub mod contenders;
pub mod table;
pub mod traffic;
