//! The operations of a decoder.
