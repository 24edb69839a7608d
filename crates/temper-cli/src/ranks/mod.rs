//! The processes that train together: who started them, and whether they are about to do the same.

#[cfg(feature = "mpi")]
mod mpi;

use std::sync::Arc;

use anyhow::Result;
use serde_json::Value;
#[cfg(feature = "mpi")]
use temper::parallel::Link;
use temper::parallel::{self, Alone, Ranks, Strategy};

use crate::args::{Parallelism, Reduce, Scope};
use crate::interrupt::Stopped;
use crate::output::hinted;
#[cfg(feature = "mpi")]
use crate::output::{self, say, warn};

/// Shards of a step when its bits must not depend on the number of ranks.
const SHARDS: usize = 4;
/// Each has gradients of its own.
const MOST_SHARDS: usize = 4096;

/// After how long a rank that does not answer ends the run. Launchers notice a process that dies, and a wait one that died
/// on the same machine; this is for what neither sees, and must be longer than a large model takes to be saved.
#[cfg(feature = "mpi")]
const TIMEOUT: std::time::Duration = std::time::Duration::from_secs(600);

/// What launchers tell the processes that they start: how many there are.
const LAUNCHERS: [(&str, &str); 3] = [
    ("OMPI_COMM_WORLD_SIZE", "Open MPI's mpirun"),
    ("PMI_SIZE", "MPICH's mpiexec"),
    ("SLURM_STEP_NUM_TASKS", "Slurm's srun"),
];

/// The ranks, and this one's share of the machine.
pub struct Together {
    /// The ranks.
    pub ranks: Ranks,
    /// Threads of this one, when its neighbours leave it less than all.
    pub threads: Option<usize>,
    /// Finalises MPI, after everything else has gone.
    #[cfg(feature = "mpi")]
    _universe: Option<::mpi::environment::Universe>,
}

/// Cores that this process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The launcher that started this process, and how many it started.
fn launcher() -> Option<(&'static str, usize)> {
    let count = |key| std::env::var(key).ok()?.parse().ok();
    LAUNCHERS.iter().find_map(|&(key, name)| Some((name, count(key)?)))
}

/// For what one process does alone: that it was not started several times.
pub fn check_alone(verb: &str) -> Result<()> {
    let Some((launcher, count)) = launcher().filter(|&(_, count)| count > 1) else { return Ok(()) };
    let message =
        format!("{launcher} started `temper {verb}` {count} times; it would do the same {count} times");
    Err(hinted(
        message,
        "start it once, without the launcher; sft, dpo, pretrain and quickstart train together",
    ))
}

/// Parts of a step, where they are given.
fn shards(options: &Parallelism) -> Result<Option<usize>> {
    match (options.reduce, options.shards) {
        (_, Some(shards @ MOST_SHARDS..)) => {
            let message = format!("`--shards {shards}`: expected fewer than {MOST_SHARDS}");
            Err(hinted(message, "as many as the most processes that share the step"))
        }
        (Reduce::Exact, shards) => Ok(Some(shards.unwrap_or(SHARDS))),
        (Reduce::Fast, None) => Ok(None),
        (Reduce::Fast, Some(_)) => {
            let hint = "give `--reduce exact` too; without it there is one part for each process";
            Err(hinted("`--shards` has no effect", hint))
        }
    }
}

/// This process alone.
pub fn alone(options: &Parallelism) -> Result<Ranks> {
    let shards = shards(options)?;
    Ok(Ranks::new(Arc::new(Alone), Strategy::Ddp, shards)?)
}

impl Together {
    /// Finds the others, when a launcher started them.
    pub fn begin(options: &Parallelism) -> Result<Together> {
        match launcher().filter(|&(_, count)| count > 1) {
            Some((launcher, count)) => Together::launched(options, shards(options)?, launcher, count),
            None if options.parallel.is_some() => {
                let hint = "start it as `mpirun -n N temper …`; a process alone has nothing to divide";
                Err(hinted("`--parallel` needs several processes", hint))
            }
            None => Ok(Together {
                ranks: alone(options)?,
                threads: None,
                #[cfg(feature = "mpi")]
                _universe: None,
            }),
        }
    }

    #[cfg(not(feature = "mpi"))]
    fn launched(_: &Parallelism, _: Option<usize>, launcher: &str, count: usize) -> Result<Together> {
        let message = format!("{launcher} started {count} processes, and this temper was built without MPI");
        let hint = "build it with `cargo build --release --features mpi`";
        Err(hinted(message, hint))
    }

    #[cfg(feature = "mpi")]
    fn launched(
        options: &Parallelism,
        shards: Option<usize>,
        launcher: &str,
        count: usize,
    ) -> Result<Together> {
        let (universe, mut link) = mpi::begin(TIMEOUT)?;
        if link.size() == 1 {
            let message = format!("{launcher} started {count} processes, and each of them is alone for MPI");
            let hint = "use the launcher of the MPI library that temper was built with, or `srun --mpi=pmix`";
            return Err(hinted(message, hint));
        }
        if link.rank() > 0 {
            output::be_quiet();
        }
        let hosts = hosts(&link)?;
        let here = &hosts[link.rank()];
        let near = |host: &&Host| host.machine == here.machine && !here.machine.is_empty();
        let neighbours = hosts.iter().enumerate().filter(|(_, host)| near(host));
        link.neighbours = neighbours.map(|(rank, host)| (rank, host.process)).collect();
        // A launcher may bind each rank to cores of its own; those that share theirs divide them.
        let sharing = hosts.iter().filter(near).filter(|host| host.cores == here.cores).count().max(1);
        let strategy = options.parallel.unwrap_or(Strategy::Ddp);
        let machines: std::collections::BTreeSet<&str> =
            hosts.iter().map(|host| host.machine.as_str()).collect();
        let threads = (cores() / sharing).max(1);
        say(
            "processes",
            format!(
                "{} on {}, {threads} threads each, {}",
                link.size(),
                if machines.len() == 1 {
                    "one machine".into()
                } else {
                    format!("{} machines", machines.len())
                },
                match strategy {
                    Strategy::Ddp => "each with the whole model (ddp)",
                    Strategy::Zero1 => "each with its part of the optimizer's states (zero1)",
                    Strategy::Fsdp => "each with its part of parameters, gradients and states (fsdp)",
                },
            ),
        );
        let rank = link.rank();
        match Ranks::new(Arc::new(link), strategy, shards) {
            Ok(ranks) => Ok(Together { ranks, threads: Some(threads), _universe: Some(universe) }),
            Err(error) => give_up(rank, error.into()),
        }
    }
}

/// Where a rank runs.
#[cfg(feature = "mpi")]
struct Host {
    machine: String,
    process: u32,
    cores: String,
}

/// The hosts of all ranks.
#[cfg(feature = "mpi")]
fn hosts(link: &mpi::Mpi) -> Result<Vec<Host>> {
    let read = |path: &str| std::fs::read_to_string(path).unwrap_or_default();
    // A machine, and the container in it: processes of another one cannot be seen.
    let container = std::fs::read_link("/proc/self/ns/pid").unwrap_or_default();
    let machine = match read("/proc/sys/kernel/random/boot_id").trim() {
        "" => String::new(),
        boot => format!("{boot} {}", container.display()),
    };
    let status = read("/proc/self/status");
    let cores = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).unwrap_or_default();
    let here = format!("{}\n{}\n{}", machine.trim(), std::process::id(), cores.trim());
    let host = |text: String| {
        let mut lines = text.lines().map(str::to_owned);
        let machine = lines.next()?;
        let process = lines.next()?.parse().ok()?;
        Some(Host { machine, process, cores: lines.next().unwrap_or_default() })
    };
    let all = parallel::gather_text(link, &here).into_iter().map(host).collect::<Option<Vec<_>>>();
    anyhow::Context::context(all, "a rank does not say where it runs")
}

/// That every rank was started with the same program and is about to do the same. `prompts` are the samples'.
pub fn check_same(ranks: &Ranks, manifest: &Value, prompts: &Value) -> Result<()> {
    if ranks.size() == 1 {
        return Ok(());
    }
    let mut own = manifest["run"].clone();
    for (key, setting) in manifest["settings"].as_object().into_iter().flatten() {
        if Scope::of(key) == Scope::Course {
            own[key] = setting["value"].clone();
        }
    }
    own["sample_prompts"] = prompts.clone();
    own["program"] = program().into();
    let all = ranks.gather_text(&own.to_string());
    parallel::check_same(&all)?;
    Ok(())
}

/// Hash of this program's file.
#[cfg(feature = "mpi")]
fn program() -> String {
    use sha2::{Digest, Sha256};
    let bytes = std::env::current_exe().and_then(std::fs::read).unwrap_or_default();
    temper::hex(&Sha256::digest(bytes)[..8])
}

#[cfg(not(feature = "mpi"))]
fn program() -> String {
    String::new()
}

impl Together {
    /// Ends this rank's part. After an error all ranks end: others may wait for this one.
    pub fn end(self, result: Result<()>) -> Result<()> {
        match result {
            Err(error) if self.ranks.size() > 1 && !error.is::<Stopped>() => {
                give_up(self.ranks.rank(), error)
            }
            // The first says so.
            Err(_) if !self.ranks.is_first() => Ok(()),
            result => result,
        }
    }
}

#[cfg(not(feature = "mpi"))]
fn give_up(_: usize, error: anyhow::Error) -> Result<()> {
    Err(error)
}

#[cfg(feature = "mpi")]
fn give_up(rank: usize, error: anyhow::Error) -> ! {
    if rank > 0 {
        // The first has the same error more often than not, says it, and ends all.
        std::thread::sleep(std::time::Duration::from_secs(2));
    }
    warn(format!("rank {rank} cannot go on"));
    output::failure(&error);
    mpi::abort(1)
}
