//! What every launcher's variables mean, and what is said about wrong ones (P21).

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use annulus::Error;
use annulus::world::{Environment, Launcher};

fn detect(variables: &str) -> Result<Environment, Error> {
    let pair = |pair: &str| {
        let (name, value) = pair.split_once('=').expect("the table writes NAME=value");
        (OsString::from(name), OsString::from(value))
    };
    Environment::detect_from(variables.split_whitespace().map(pair))
}

const TORCH: &str = "MASTER_ADDR=localhost MASTER_PORT=29500";
const TORCHRUN: &str = "RANK=1 WORLD_SIZE=4 LOCAL_RANK=1 LOCAL_WORLD_SIZE=4 GROUP_RANK=0 MASTER_ADDR=h MASTER_PORT=29500 \
                        TORCHELASTIC_RUN_ID=abc TORCHELASTIC_RESTART_COUNT=0";
const SRUN: &str = "SLURM_JOB_ID=7 SLURM_STEP_ID=0 SLURM_PROCID=2 SLURM_STEP_NUM_TASKS=3 SLURM_NTASKS=8 SLURM_LOCALID=2 \
                    SLURM_NODEID=0 SLURM_STEP_NUM_NODES=1 PMIX_RANK=2 PMIX_NAMESPACE=slurm.pmix.7.0";
const MPIRUN: &str = "OMPI_COMM_WORLD_RANK=1 OMPI_COMM_WORLD_SIZE=2 OMPI_COMM_WORLD_LOCAL_RANK=1 \
                      OMPI_COMM_WORLD_LOCAL_SIZE=2 OMPI_COMM_WORLD_NODE_RANK=1 PMIX_RANK=1 PMIX_NAMESPACE=prterun-vm-1@1";
const MPIEXEC: &str = "PMI_RANK=0 PMI_SIZE=2 PMI_FD=9 MPI_LOCALRANKID=0 MPI_LOCALNRANKS=2";

#[test]
fn every_launcher_is_understood() {
    let table = [
        ("", Launcher::Single, 0, 1),
        ("PATH=/bin HOME=/root", Launcher::Single, 0, 1),
        ("ANNULUS_RANK=0 ANNULUS_WORLD_SIZE=1", Launcher::Annulus, 0, 1),
        (TORCHRUN, Launcher::Torchrun, 1, 4),
        ("RANK=0 WORLD_SIZE=1", Launcher::Torchrun, 0, 1),
        (&format!("RANK=63 WORLD_SIZE=64 {TORCH}"), Launcher::Torchrun, 63, 64),
        (SRUN, Launcher::Slurm, 2, 3),
        ("SLURM_JOB_ID=7 SLURM_STEPID=3 SLURM_PROCID=0 SLURM_NTASKS=2", Launcher::Slurm, 0, 2),
        (MPIRUN, Launcher::OpenMpi, 1, 2),
        ("OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=2 OMPI_MCA_ess_base_jobid=77", Launcher::OpenMpi, 0, 2),
        (MPIEXEC, Launcher::Mpich, 0, 2),
        // PMI variables of srun --mpi=pmi2 say what Slurm's say.
        (&format!("{SRUN} PMI_RANK=2 PMI_SIZE=3"), Launcher::Slurm, 2, 3),
        // RANK set by hand from SLURM_PROCID.
        (&format!("{SRUN} RANK=2 WORLD_SIZE=3 {TORCH}"), Launcher::Torchrun, 2, 3),
        // torchrun numbers its own workers, whoever started it.
        (&format!("{TORCHRUN} SLURM_JOB_ID=7 SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_NTASKS=1"), Launcher::Torchrun, 1, 4),
        (&format!("{TORCHRUN} {SRUN}"), Launcher::Torchrun, 1, 4),
        // mpirun in a shell that srun opened.
        (&format!("{MPIRUN} SLURM_JOB_ID=7 SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_NTASKS=1"), Launcher::OpenMpi, 1, 2),
    ];
    for (variables, launcher, rank, world_size) in table {
        let environment = detect(variables).unwrap_or_else(|error| panic!("{variables}: {error}"));
        let Environment { local_rank, local_world_size, node_rank, .. } = environment;
        assert_eq!(
            (environment.launcher, environment.rank, environment.world_size),
            (launcher, rank, world_size),
            "{variables}"
        );
        assert_eq!((local_rank, local_world_size, node_rank), (rank, world_size, 0), "{variables}");
    }
}

/// prterun numbers the ranks of one machine in another order when it oversubscribes (seen with Open MPI 5.0.11).
#[test]
fn local_ranks_may_be_in_another_order() {
    let environment = detect(&MPIRUN.replace("LOCAL_RANK=1", "LOCAL_RANK=0")).unwrap();
    assert_eq!((environment.rank, environment.local_rank), (1, 0));
    let error = detect(&MPIRUN.replace("LOCAL_RANK=1", "LOCAL_RANK=2")).unwrap_err();
    assert!(error.to_string().contains("OMPI_COMM_WORLD_LOCAL_RANK=2: must be below"), "{error}");
}

/// An allocation is not a launch, and a job's name says nothing.
#[test]
fn slurm_without_srun_is_one_rank() {
    let allocation = "SLURM_JOB_ID=7 SLURM_NTASKS=4 SLURM_NNODES=1";
    for (shell, expected) in [
        ("", 1),
        // The batch script: a task number, but no step.
        ("SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0", 1),
        // The shell of salloc is an interactive step, the batch script a batch step.
        ("SLURM_PROCID=0 SLURM_STEP_ID=4294967290 SLURM_JOB_NAME=interactive", 1),
        ("SLURM_PROCID=0 SLURM_STEP_ID=4294967291", 1),
        // srun --pty bash
        ("SLURM_PROCID=0 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=1 SLURM_JOB_NAME=bash", 1),
        // srun inside the shell of salloc keeps the job's name and is a launch all the same.
        ("SLURM_PROCID=3 SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=4 SLURM_JOB_NAME=interactive", 4),
    ] {
        let environment = detect(&format!("{allocation} {shell}")).unwrap();
        assert_eq!(environment.world_size, expected, "{shell}");
    }
}

#[test]
fn p21_malformed_variables_are_named_with_value_and_accepted_form() {
    let table = [
        ("RANK=-1 WORLD_SIZE=2", "RANK", "-1", "0 to 63"),
        ("RANK=+1 WORLD_SIZE=2", "RANK", "+1", "0 to 63"),
        ("RANK=1.0 WORLD_SIZE=2", "RANK", "1.0", "0 to 63"),
        ("RANK= WORLD_SIZE=2", "RANK", "", "0 to 63"),
        ("RANK=99999999999999999999 WORLD_SIZE=2", "RANK", "99999999999999999999", "0 to 63"),
        ("RANK=0 WORLD_SIZE=0", "WORLD_SIZE", "0", "1 to 64"),
        ("RANK=0 WORLD_SIZE=65", "WORLD_SIZE", "65", "1 to 64"),
        ("RANK=0 WORLD_SIZE=two", "WORLD_SIZE", "two", "1 to 64"),
        ("RANK=0", "WORLD_SIZE", "", "because RANK is"),
        ("WORLD_SIZE=2", "RANK", "", "because WORLD_SIZE is"),
        ("RANK=4 WORLD_SIZE=4 MASTER_ADDR=h MASTER_PORT=1", "RANK", "4", "below WORLD_SIZE=4"),
        ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=h", "MASTER_PORT", "", "must be set"),
        ("RANK=0 WORLD_SIZE=2 MASTER_PORT=29500", "MASTER_ADDR", "", "must be set"),
        ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=h MASTER_PORT=0", "MASTER_PORT", "0", "1 to 65535"),
        ("RANK=0 WORLD_SIZE=2 MASTER_ADDR=h MASTER_PORT=65536", "MASTER_PORT", "65536", "1 to 65535"),
        ("RANK=0 WORLD_SIZE=2 MASTER_ADDR= MASTER_PORT=1", "MASTER_ADDR", "", "must not be empty"),
        ("RANK=0 WORLD_SIZE=2 LOCAL_RANK=x MASTER_ADDR=h MASTER_PORT=1", "LOCAL_RANK", "x", "0 to 63"),
        ("SLURM_STEP_ID=x SLURM_PROCID=0", "SLURM_STEP_ID", "x", "step number"),
        ("SLURM_STEP_ID=0 SLURM_PROCID=0", "SLURM_STEP_NUM_TASKS", "", "must be set"),
        ("SLURM_STEP_ID=0 SLURM_PROCID=0 SLURM_NTASKS=2", "SLURM_JOB_ID", "", "must be set"),
        ("OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=2", "OMPI_MCA_ess_base_jobid", "", "must be set"),
        ("OMPI_COMM_WORLD_RANK=5 OMPI_COMM_WORLD_SIZE=2 PMIX_NAMESPACE=n", "OMPI_COMM_WORLD_RANK", "5", "below"),
        ("PMI_RANK=0", "PMI_SIZE", "", "must be set"),
        ("PMIX_RANK=0 PMIX_NAMESPACE=n", "PMIX_RANK", "0", "without a world size"),
        ("ANNULUS_RANK=0 ANNULUS_WORLD_SIZE=2", "ANNULUS_JOB", "", "must be set"),
        ("ANNULUS_RANK=0 ANNULUS_WORLD_SIZE=2 ANNULUS_JOB=zz", "ANNULUS_JOB", "zz", "32 hexadecimal"),
        (
            "ANNULUS_RANK=1 ANNULUS_WORLD_SIZE=2 ANNULUS_JOB=00000000000000000000000000000000 ANNULUS_CONNECT_FD=999",
            "ANNULUS_CONNECT_FD",
            "999",
            "open descriptor",
        ),
        (
            "ANNULUS_RANK=1 ANNULUS_WORLD_SIZE=2 ANNULUS_JOB=00000000000000000000000000000000 ANNULUS_CONNECT_FD=-1",
            "ANNULUS_CONNECT_FD",
            "-1",
            "number of an inherited descriptor",
        ),
    ];
    for (variables, name, value, accepted) in table {
        let error = detect(variables).expect_err(variables);
        let Error::Environment { variable, value: seen, accepted: form } = &error else {
            panic!("{variables}: {error:?}");
        };
        assert_eq!((variable.as_str(), seen.as_str()), (name, value), "{variables}");
        assert!(form.contains(accepted), "{variables}: {form}");
        assert!(!error.to_string().contains('\n'));
    }
}

#[test]
fn p21_values_that_are_not_text_are_shown_on_one_line() {
    let error = Environment::detect_from([
        (OsString::from("RANK"), OsString::from_vec(vec![0xff, b'\n', b'1'])),
        (OsString::from("WORLD_SIZE"), OsString::from("2")),
    ])
    .unwrap_err();
    let text = error.to_string();
    assert!(text.contains("RANK=\u{fffd}\\n1") && text.contains("UTF-8") && !text.contains('\n'), "{text}");
    // Names that are not text belong to nobody we know.
    let odd = [(OsString::from_vec(vec![0xff]), OsString::from("1"))];
    assert_eq!(Environment::detect_from(odd).unwrap().world_size, 1);
}

#[test]
fn p21_launchers_that_disagree_are_both_named() {
    let table = [
        ("ANNULUS_RANK=0 ANNULUS_WORLD_SIZE=1 RANK=1 WORLD_SIZE=2", "ANNULUS_RANK", "RANK"),
        ("ANNULUS_RANK=0 ANNULUS_WORLD_SIZE=1 RANK=0 WORLD_SIZE=2", "ANNULUS_WORLD_SIZE", "WORLD_SIZE"),
        (&format!("RANK=0 WORLD_SIZE=3 {TORCH} {SRUN}"), "RANK", "SLURM_PROCID"),
        (&format!("RANK=2 WORLD_SIZE=8 {TORCH} {SRUN}"), "WORLD_SIZE", "SLURM_STEP_NUM_TASKS"),
        (&format!("{SRUN} OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=3"), "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"),
        (&MPIRUN.replace("PMIX_RANK=1", "PMIX_RANK=0"), "OMPI_COMM_WORLD_RANK", "PMIX_RANK"),
        (&SRUN.replace("PMIX_RANK=2", "PMIX_RANK=1"), "SLURM_PROCID", "PMIX_RANK"),
    ];
    for (variables, one, other) in table {
        let error = detect(variables).expect_err(variables);
        let Error::EnvironmentConflict { first, second, .. } = &error else { panic!("{variables}: {error:?}") };
        assert_eq!((first.as_str(), second.as_str()), (one, other), "{variables}");
    }
}

#[test]
fn more_than_one_node_is_refused_by_name() {
    let table = [
        (TORCHRUN.replace("LOCAL_WORLD_SIZE=4", "LOCAL_WORLD_SIZE=2"), "LOCAL_WORLD_SIZE"),
        (TORCHRUN.replace("LOCAL_RANK=1 LOCAL_WORLD_SIZE=4", "LOCAL_RANK=0"), "LOCAL_RANK"),
        (TORCHRUN.replace("GROUP_RANK=0", "GROUP_RANK=1"), "GROUP_RANK"),
        (SRUN.replace("NUM_NODES=1", "NUM_NODES=2"), "SLURM_STEP_NUM_NODES"),
        (SRUN.replace("NODEID=0", "NODEID=1"), "SLURM_NODEID"),
        (SRUN.replace("LOCALID=2", "LOCALID=0").replace("SLURM_STEP_NUM_NODES=1", ""), "SLURM_LOCALID"),
        (MPIRUN.replace("LOCAL_SIZE=2", "LOCAL_SIZE=1"), "OMPI_COMM_WORLD_LOCAL_SIZE"),
        (MPIEXEC.replace("LOCALNRANKS=2", "LOCALNRANKS=1"), "MPI_LOCALNRANKS"),
    ];
    for (variables, name) in table {
        let error = detect(&variables).expect_err(&variables);
        let Error::Environment { variable, accepted, .. } = &error else { panic!("{variables}: {error:?}") };
        assert_eq!(variable, name, "{variables}");
        assert!(accepted.contains("one node only"), "{accepted}");
    }
}
