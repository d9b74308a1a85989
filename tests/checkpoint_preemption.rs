//! P24: a job that is told to end (SIGTERM, as Slurm and torchrun do) writes a checkpoint and ends well, within the grace
//! period; the next job goes on from there.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use annulus::strategy::checkpoint::Checkpoint;
use annulus::strategy::{
    AdamW, Ddp, GradSink, Init, Module, ModuleInit, Nonfinite, Parameter, State, StateMut, Strategy, StrategyOptions,
};
use annulus::world::{Environment, Launcher, launch};
use annulus::{NormType, Result};

const FOLDER: &str = "ANNULUS_TEST_JOB_FOLDER";
const GRACE: Duration = Duration::from_secs(30);

struct Model(Parameter);

impl Module for Model {
    fn parameters(&self, visit: &mut dyn FnMut(&Parameter)) {
        visit(&self.0);
    }
}

impl Model {
    fn new(init: &ModuleInit) -> Result<Model> {
        Ok(Model(init.parameter("weight", &[1000], |values| values.fill(1.0))?))
    }
}

/// The job: two ranks that train until they are told to end.
#[test]
#[ignore = "the child process of p24"]
fn p24_job() {
    let Some(folder) = std::env::var_os(FOLDER).map(PathBuf::from) else { return };
    let environment = Environment::detect().unwrap();
    if environment.launcher == Launcher::Single {
        std::process::exit(launch::spawn_self(2, &Default::default()).unwrap().code);
    }
    train(environment, &folder).unwrap();
    std::process::exit(0);
}

fn train(environment: Environment, folder: &Path) -> Result<()> {
    let asked_to_stop = Arc::new(AtomicBool::new(false));
    signal_hook::flag::register(signal_hook::consts::SIGTERM, Arc::clone(&asked_to_stop)).unwrap();
    let path = folder.join("job.safetensors");
    let mut strategy = Ddp::setup_environment(environment, StrategyOptions::default())?;
    let model = Model::new(&strategy.module_init_context(Init::Default))?;
    let (mut model, mut optimizer) = strategy.setup_module_and_optimizers(model, AdamW::new(1e-3))?;
    let mut steps = 0_u64;
    if path.exists() {
        let mut state =
            StateMut::new().module("model", &model).optimizer("optimizer", &mut optimizer).value("steps", &mut steps);
        strategy.load_checkpoint(&path, Some(&mut state), true)?;
    }
    loop {
        let loss = |model: &mut Model, gradients: &mut GradSink<'_>| gradients.write(&model.0, &[0.5_f32; 1000]);
        strategy.backward(&loss, &mut model)?;
        strategy.clip_gradients_norm(&model, &mut optimizer, 1.0, NormType::L2, Nonfinite::SkipStep)?;
        strategy.optimizer_step(&mut optimizer)?;
        steps += 1;
        // The signal reaches the ranks at different steps; they decide together.
        if strategy.reduce_boolean_decision(asked_to_stop.load(Ordering::Relaxed), false)? {
            break;
        }
        if steps.is_multiple_of(50) && strategy.is_global_zero() {
            std::fs::write(folder.join("running"), steps.to_string()).unwrap();
        }
    }
    let state = State::new().module("model", &model).optimizer("optimizer", &optimizer).value("steps", &steps);
    strategy.save_checkpoint(&path, &state, None)?;
    strategy.teardown(GRACE)
}

fn start(folder: &Path) -> Child {
    let _ = std::fs::remove_file(folder.join("running"));
    let job = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "p24_job", "--ignored", "--nocapture"])
        .env(FOLDER, folder)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let begun = Instant::now();
    while !folder.join("running").exists() {
        assert!(begun.elapsed() < Duration::from_secs(60), "the job does not get going");
        std::thread::sleep(Duration::from_millis(5));
    }
    job
}

#[test]
fn p24_sigterm_leaves_a_checkpoint_and_exit_code_0() {
    let folder = tempfile::tempdir().unwrap();
    let mut steps_before = 0;
    for _ in 0..2 {
        let mut job = start(folder.path());
        let told = Instant::now();
        rustix::process::kill_process(rustix::process::Pid::from_child(&job), rustix::process::Signal::TERM).unwrap();
        let status = job.wait().unwrap();
        assert!(told.elapsed() < GRACE, "{:?}", told.elapsed());
        assert_eq!(status.code(), Some(0), "{status}");
        let checkpoint = Checkpoint::open(&folder.path().join("job.safetensors")).unwrap();
        let steps: u64 = checkpoint.value("steps").unwrap().unwrap();
        assert!(steps > steps_before, "the second job went on from the first one's {steps_before}: {steps}");
        let optimizer: serde_json::Value = checkpoint.value("optimizer").unwrap().unwrap();
        assert_eq!(optimizer["steps"], steps, "weights and counters belong together");
        steps_before = steps;
    }
}
