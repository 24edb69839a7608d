//! What runs came to, as a page, a picture or data.
//!
//! [`run`] reads run directories, [`plots`] says which plots there are, [`page`] writes the report, [`stages`] the page of
//! a quickstart and of a comparison.

pub mod html;
pub mod metrics;
pub mod page;
pub mod picture;
pub mod plots;
pub mod run;
pub mod stages;
pub mod tables;
pub mod thin;
