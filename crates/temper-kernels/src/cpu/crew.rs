//! Threads that wait awake between many small pieces of work, such as the two hundred operations of one token. Where they went
//! to sleep in between, two threads were idle for 8 % of the time, and the system took 6 % of the rest.

use std::cell::Cell;
use std::hint::spin_loop;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicUsize, Ordering::SeqCst};

use rayon::prelude::*;

thread_local! {
    /// The crew that this thread leads.
    static CREW: Cell<*const Crew> = const { Cell::new(std::ptr::null()) };
}

/// Calls `f(i)` for each `i < count`, by the crew that this thread leads, or else by the current pool. `f` gives nothing
/// to the pool: a helper that waits there could take the job of another helper, which ends with the crew alone.
pub fn for_each(count: usize, f: impl Fn(usize) + Sync) {
    if count == 1 {
        return f(0);
    }
    // SAFETY: `lead` keeps the crew for as long as it is here.
    match unsafe { CREW.get().as_ref() } {
        Some(crew) => crew.run(count, &f),
        None => (0..count).into_par_iter().with_max_len(1).for_each(&f),
    }
}

/// Calls `f(i, chunk)` for the chunks of `size` of some values, by the crew or the pool.
pub fn for_each_chunk<T: Send>(values: &mut [T], size: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    let (first, len) = (AtomicPtr::new(values.as_mut_ptr()), values.len());
    for_each(len.div_ceil(size), |i| {
        let (start, first) = (i * size, first.load(SeqCst));
        // SAFETY: each chunk lies inside the values, and is given out once.
        f(i, unsafe { std::slice::from_raw_parts_mut(first.add(start), size.min(len - start)) });
    });
}

/// Runs `f` in the current pool, whose other threads wait awake for what `f` gives to [`for_each`]. What `f` gives to the pool
/// itself is done by this thread alone.
pub fn lead<R>(f: impl FnOnce() -> R) -> R {
    let leader = rayon::current_thread_index();
    let threads = rayon::current_num_threads();
    if leader.is_none() || threads == 1 || !CREW.get().is_null() {
        return f();
    }
    let crew = Crew::default();
    rayon::in_place_scope(|scope| {
        for _ in 1..threads {
            // The leader finds this job itself when it waits for the pool.
            scope.spawn(|_| {
                if rayon::current_thread_index() != leader {
                    crew.help();
                }
            });
        }
        CREW.set(&raw const crew);
        let _end = AtEnd(|| {
            CREW.set(std::ptr::null());
            crew.dismissed.store(true, SeqCst);
        });
        f()
    })
}

/// Calls a function when it is dropped, also by a panic.
struct AtEnd<F: FnMut()>(F);

impl<F: FnMut()> Drop for AtEnd<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// What a leader and its helpers share.
#[derive(Default)]
struct Crew {
    /// The work in hand; null when there is none.
    work: AtomicPtr<Work>,
    /// Works so far.
    number: AtomicUsize,
    /// Helpers that may look at the work.
    inside: AtomicUsize,
    /// Whether a helper panicked: its pieces are not all done.
    failed: AtomicBool,
    dismissed: AtomicBool,
}

/// Pieces to be done, each once.
struct Work {
    count: usize,
    next: AtomicUsize,
    f: *const (dyn Fn(usize) + Sync),
}

impl Work {
    /// # Safety
    /// The function must still be there.
    unsafe fn take_part(&self) {
        loop {
            let i = self.next.fetch_add(1, SeqCst);
            if i >= self.count {
                return;
            }
            // SAFETY: the caller's promise.
            unsafe { (*self.f)(i) }
        }
    }
}

impl Crew {
    fn run(&self, count: usize, f: &(dyn Fn(usize) + Sync)) {
        // SAFETY: only the lifetime changes; what is dropped at the end waits until nobody looks at it any more.
        let f: *const (dyn Fn(usize) + Sync) = unsafe { std::mem::transmute(f) };
        let work = Work { count, next: AtomicUsize::new(0), f };
        let end = AtEnd(|| {
            self.work.store(null_mut(), SeqCst);
            while self.inside.load(SeqCst) > 0 {
                spin_loop();
            }
        });
        self.work.store((&raw const work).cast_mut(), SeqCst);
        self.number.fetch_add(1, SeqCst);
        // SAFETY: `f` outlives this function.
        unsafe { work.take_part() }
        drop(end);
        assert!(!self.failed.load(SeqCst), "a thread panicked");
    }

    fn help(&self) {
        /// Turns of waiting after which others may have the processor.
        const PATIENCE: usize = 1 << 12;
        let (mut seen, mut waited) = (0, 0);
        while !self.dismissed.load(SeqCst) {
            let number = self.number.load(SeqCst);
            if number == seen {
                waited += 1;
                if waited % PATIENCE == 0 {
                    std::thread::yield_now()
                } else {
                    spin_loop()
                }
                continue;
            }
            (seen, waited) = (number, 0);
            self.inside.fetch_add(1, SeqCst);
            let _end = AtEnd(|| {
                if std::thread::panicking() {
                    self.failed.store(true, SeqCst);
                }
                self.inside.fetch_sub(1, SeqCst);
            });
            // SAFETY: work that is still in hand now stays until `inside` is 0 again, and its function too.
            unsafe {
                if let Some(work) = self.work.load(SeqCst).as_ref() {
                    work.take_part();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind};

    use super::*;

    fn pool() -> rayon::ThreadPool {
        rayon::ThreadPoolBuilder::new().num_threads(3).build().unwrap()
    }

    /// Each piece is done once, whatever else the leader gives to the pool in between.
    #[test]
    fn every_piece_is_done_once() {
        pool().install(|| {
            lead(|| {
                for count in (0..2_000).map(|i| i % 17) {
                    let done: Vec<AtomicUsize> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                    for_each(count, |i| _ = done[i].fetch_add(1, SeqCst));
                    assert!(done.iter().all(|done| done.load(SeqCst) == 1));
                    if count == 5 {
                        let sum: usize = (0..100).into_par_iter().sum();
                        assert_eq!(sum, 4950);
                        lead(|| for_each(3, |_| ()));
                    }
                }
            });
            for_each(3, |_| ());
        });
        lead(|| for_each(3, |_| ()));
    }

    /// A panic, of the leader or of a helper, comes out, and nobody waits for ever.
    #[test]
    fn a_panic_comes_out() {
        let pool = pool();
        for bad in 0..4 {
            let run = || pool.install(|| lead(|| for_each(50, |i| assert_ne!(i % 4, bad))));
            assert!(catch_unwind(AssertUnwindSafe(run)).is_err());
        }
        pool.install(|| lead(|| for_each(3, |_| ())));
    }
}
