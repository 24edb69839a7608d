//! What runs came to, as a page, a picture or data.
//!
//! [`run`] reads run directories, [`plots`] says which plots there are, [`page`] writes the report; [`thin`],
//! [`picture`] and [`html`] serve the quickstart's page, too.

pub mod html;
pub mod metrics;
pub mod page;
pub mod picture;
pub mod plots;
pub mod run;
pub mod tables;
pub mod thin;
