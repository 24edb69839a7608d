//! Large buffers in large pages.

use super::pack::Element;

/// Zeros; from 1 MiB on in pages of 2 MiB, where Linux has them. It hands out memory at the first write, page by page:
/// a first DPO step of SmolLM2 ended after 10 to 13 s instead of 13 to 18 on a host that is slow at it.
pub fn zeros<E: Element>(len: usize) -> Vec<E> {
    let buffer = vec![E::ZERO; len];
    #[cfg(target_os = "linux")]
    if size_of_val(&buffer[..]) >= 1 << 20 {
        const PAGE: usize = 4096;
        let start = buffer.as_ptr().addr() / PAGE * PAGE;
        let bytes = buffer.as_ptr_range().end.addr().next_multiple_of(PAGE) - start;
        // SAFETY: advice about pages of this process, which changes no byte of them; without effect where it is refused.
        unsafe { libc::madvise(std::ptr::without_provenance_mut(start), bytes, libc::MADV_HUGEPAGE) };
    }
    buffer
}
