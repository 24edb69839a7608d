//! Real processes under `mpirun`, with the feature `mpi`; without it, that being started several times is an error.

use crate::support::{Place, fixture};

#[cfg(not(feature = "mpi"))]
#[test]
fn without_mpi_several_processes_are_an_error() {
    let place = Place::new();
    let (model, data) = (fixture("chat-tiny"), place.chats());
    for key in ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"] {
        let arguments = ["sft", "--model", &model, "--data", &data, "--out", "run"];
        let ran = crate::support::Ran(place.temper(arguments).env(key, "2").output().unwrap());
        ran.failed(1, &["2 processes", "without MPI", "--features mpi"]);
        assert!(!place.path("run").exists());
    }
}

#[test]
fn what_one_process_does_is_not_done_twice() {
    let place = Place::new();
    let (model, data) = (fixture("chat-tiny"), place.pairs());
    let arguments = ["score", "--model", &model, "--data", &data];
    let command = || place.temper(arguments);
    let ran = crate::support::Ran(command().env("OMPI_COMM_WORLD_SIZE", "2").output().unwrap());
    ran.failed(1, &["2 times", "hint: "]);
    crate::support::Ran(command().env("OMPI_COMM_WORLD_SIZE", "1").output().unwrap()).good();
}

#[test]
fn options_for_processes_need_them() {
    let place = Place::new();
    let (model, data) = (fixture("chat-tiny"), place.chats());
    let words = format!("sft --model {model} --data {data} --out run --max-steps 1");
    place.run(&words, &["--parallel", "zero1"]).failed(1, &["several processes", "mpirun"]);
    place.run(&words, &["--shards", "2"]).failed(1, &["`--shards` has no effect", "--reduce exact"]);
    place.run(&words, &["--reduce", "exact", "--shards", "3"]).failed(1, &["3 shards on 1 ranks"]);
}

#[cfg(feature = "mpi")]
mod processes {
    use std::fs;
    use std::process::{Child, Command, Stdio};
    use std::time::{Duration, Instant};

    use serde_json::Value;

    use super::{Place, fixture};
    use crate::support::{Ran, lines};

    /// The longest that a failing job may take to end.
    const DEADLINE: Duration = Duration::from_secs(30);

    /// `mpirun` with one group of processes for each count and options.
    fn mpirun(place: &Place, words: &str, groups: &[(usize, &str)]) -> Command {
        let mut command = Command::new("mpirun");
        // No cache: every job computes its reference.
        command.current_dir(place.path("")).env_remove("XDG_CACHE_HOME").env_remove("HOME");
        // Several ranks on a core, and as whoever runs the tests.
        command
            .env("OMPI_MCA_rmaps_base_oversubscribe", "1")
            .env("OMPI_MCA_hwloc_base_binding_policy", "none");
        command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
        for (i, (count, more)) in groups.iter().enumerate() {
            command.args((i > 0).then_some(":"));
            command.args(["-n", &count.to_string(), env!("CARGO_BIN_EXE_temper")]);
            command.args(words.split_whitespace().chain(more.split_whitespace()));
        }
        command
    }

    fn dpo(place: &Place) -> String {
        let (model, data) = (fixture("chat-tiny"), place.pairs());
        format!(
            "dpo --model {model} --data {data} --eval-data {data} --eval-steps 3 --batch-size 5 --max-steps 6 \
             --learning-rate 1e-3 --dropout 0.1 --save-steps 4"
        )
    }

    fn weights(place: &Place, out: &str) -> Vec<u8> {
        fs::read(place.path(out).join("final/model.safetensors")).unwrap()
    }

    fn losses(place: &Place, out: &str) -> Vec<f64> {
        let all = lines(&place.path(out).join("metrics.jsonl"));
        all.iter().filter_map(|line| line["loss"].as_f64().or(line["eval_loss"].as_f64())).collect()
    }

    #[test]
    fn any_number_of_processes_gives_the_same_bits() {
        let place = Place::new();
        let words = format!("{} --reduce exact", dpo(&place));
        place.run(&words, &["--out", "alone"]).good();
        for (count, how) in [(2, "ddp"), (4, "ddp"), (2, "zero1"), (4, "fsdp")] {
            let out = format!("{how}{count}");
            let more = format!("--parallel {how} --out {out}");
            Ran(mpirun(&place, &words, &[(count, &more)]).output().unwrap()).good();
            assert!(weights(&place, &out) == weights(&place, "alone"), "{out}");
            assert_eq!(losses(&place, &out), losses(&place, "alone"), "{out}");
        }
    }

    #[test]
    fn the_fast_way_differs_by_rounding_only() {
        let place = Place::new();
        let words = dpo(&place);
        place.run(&words, &["--out", "alone"]).good();
        Ran(mpirun(&place, &words, &[(2, "--parallel fsdp --out two")]).output().unwrap()).good();
        let (one, two) = (losses(&place, "alone"), losses(&place, "two"));
        assert_eq!(one.len(), two.len());
        for (one, two) in one.iter().zip(two) {
            assert!((one - two).abs() < 1e-5, "{one} {two}");
        }
    }

    #[test]
    fn processes_that_would_do_different_things_are_named() {
        let place = Place::new();
        let other = place.jsonl("other.jsonl", [serde_json::json!({ "text": "Something else." })]);
        for (more, words) in [
            ("--beta 0.2".to_owned(), ["rank 1", "`beta`"]),
            (format!("--eval-data {other}"), ["rank 1 cannot go on", "other.jsonl"]),
            ("--reference nowhere".to_owned(), ["rank 1 cannot go on", "nowhere"]),
            ("--parallel zero1".to_owned(), ["rank 1", "`parallel`"]),
            ("--save-steps 2".to_owned(), ["rank 1", "`save_steps`"]),
        ] {
            let begun = Instant::now();
            let (first, second) = ("--out run", format!("--out run {more}"));
            let ran = mpirun(&place, &dpo(&place), &[(1, first), (1, &second)]).output().unwrap();
            Ran(ran).failed(1, &words);
            assert!(begun.elapsed() < DEADLINE);
            assert!(!place.path("run/final").exists());
        }
    }

    #[test]
    fn another_program_is_named() {
        let place = Place::new();
        let other = place.path("temper-other");
        let mut program = fs::read(env!("CARGO_BIN_EXE_temper")).unwrap();
        program.push(0); // after the end of what is loaded: it does the same
        fs::write(&other, program).unwrap();
        fs::set_permissions(&other, fs::metadata(env!("CARGO_BIN_EXE_temper")).unwrap().permissions())
            .unwrap();
        let words = format!("{} --out run", dpo(&place));
        let mut command = mpirun(&place, &words, &[(1, "")]);
        command.args([":", "-n", "1"]).arg(&other).args(words.split_whitespace());
        Ran(command.output().unwrap()).failed(1, &["rank 1", "`program`"]);
    }

    #[test]
    fn the_quickstart_is_told_once() {
        let place = Place::new();
        let ran = Ran(mpirun(&place, "quickstart --smoke", &[(2, "--out q")]).output().unwrap()).good();
        assert_eq!(ran.stdout().matches("a record, [trained] tokens").count(), 1);
        for file in ["report.html", "data/preferences.jsonl", "dpo/model.safetensors"] {
            assert!(place.path("q").join(file).exists(), "{file}");
        }
        Ran(mpirun(&place, "quickstart --smoke", &[(2, "--out q")]).output().unwrap())
            .failed(1, &["is not empty", "hint"]);
    }

    /// A long run of two processes that has saved a checkpoint.
    fn long_run(place: &Place) -> Child {
        let words = format!("{} --max-steps 1000000 --out long", dpo(place));
        let said = fs::File::create(place.path("said")).unwrap();
        let mut command = mpirun(place, &words, &[(2, "")]);
        let mut child = command.stdout(Stdio::null()).stderr(said).spawn().unwrap();
        while newest(place).is_none() {
            assert!(child.try_wait().unwrap().is_none(), "{}", said_of(place));
            std::thread::sleep(Duration::from_millis(20));
        }
        child
    }

    fn said_of(place: &Place) -> String {
        fs::read_to_string(place.path("said")).unwrap()
    }

    /// The step of the newest whole checkpoint.
    fn newest(place: &Place) -> Option<u64> {
        let folders = fs::read_dir(place.path("long/checkpoints")).into_iter().flatten();
        let folders = folders.map(|entry| entry.unwrap().path()).filter(|path| path.join("DONE").exists());
        let step = |folder: std::path::PathBuf| {
            let state = fs::read(folder.join("state.json")).ok()?;
            serde_json::from_slice::<Value>(&state).unwrap()["step"].as_u64()
        };
        folders.filter_map(step).max()
    }

    fn signal(name: &str, process: u32) {
        assert!(Command::new("kill").args([name, &process.to_string()]).status().unwrap().success());
    }

    /// The processes of a job, in the order of their ranks.
    fn ranks(job: &Child) -> Vec<u32> {
        let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", job.id())).unwrap();
        children.split_whitespace().map(|process| process.parse().unwrap()).collect()
    }

    /// That the newest checkpoint is of the last step done.
    fn assert_all_saved(place: &Place, name: &str) {
        let done = lines(&place.path("long/metrics.jsonl"));
        let last = done.iter().rfind(|line| line["loss"].is_number()).unwrap();
        assert_eq!(newest(place), last["step"].as_u64(), "{name}: {}", said_of(place));
    }

    /// Waits for a job to end badly, in time.
    fn ends(place: &Place, mut job: Child) {
        let begun = Instant::now();
        while job.try_wait().unwrap().is_none() {
            if begun.elapsed() > DEADLINE {
                job.kill().unwrap();
                panic!("still running:\n{}", said_of(place));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
        assert!(!job.wait().unwrap().success());
    }

    #[test]
    fn a_process_that_dies_ends_the_job() {
        let place = Place::new();
        let job = long_run(&place);
        signal("-KILL", ranks(&job)[1]);
        ends(&place, job);
        let said = said_of(&place);
        assert!(said.contains("rank 1 is gone") || said.contains("process rank 1"), "{said}");
        assert!(newest(&place).is_some());
    }

    #[test]
    fn a_signal_to_the_launcher_saves_and_stops() {
        for name in ["-TERM", "-INT", "-USR1"] {
            let place = Place::new();
            let job = long_run(&place);
            signal(name, job.id());
            ends(&place, job);
            assert_all_saved(&place, name);
        }
    }

    #[test]
    fn a_signal_to_one_rank_and_then_to_another_is_not_a_second_one() {
        for _ in 0..5 {
            let place = Place::new();
            let job = long_run(&place);
            for rank in ranks(&job) {
                signal("-TERM", rank);
            }
            ends(&place, job);
            assert_all_saved(&place, "-TERM");
            // The first says that it was asked to stop; another that ended at once would be named here.
            let said = said_of(&place);
            assert!(said.contains(",1],0]") && !said.contains(",1],1]"), "{said}");
        }
    }

    #[test]
    fn a_full_disk_on_the_first_ends_the_job() {
        let place = Place::new();
        let script = place
            .file("small.sh", "if [ \"$OMPI_COMM_WORLD_RANK\" = 0 ]; then ulimit -f 30; fi\nexec \"$@\"\n");
        let begun = Instant::now();
        let mut command = mpirun(&place, "", &[]);
        command.args(["-n", "2", "bash", &script, env!("CARGO_BIN_EXE_temper")]);
        command.args(dpo(&place).split_whitespace()).args(["--out", "run"]);
        Ran(command.output().unwrap())
            .failed(1, &["rank 0 cannot go on", "error: cannot write", "too large"]);
        assert!(begun.elapsed() < DEADLINE);
        assert!(!place.path("run/final").exists());
    }
}
