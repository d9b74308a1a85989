//! The folder of a run.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::failure::Failure;

/// Where a run keeps its files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RunFolder(PathBuf);

impl RunFolder {
    /// Makes the folder of a new run: `chosen`, which must hold nothing, or the first free of `runs/gpt-1`, `runs/gpt-2`, ..
    ///
    /// # Errors
    /// [`Failure::Usage`] if `chosen` holds something; [`Failure::File`].
    pub fn create(chosen: Option<&Path>) -> Result<RunFolder, Failure> {
        if let Some(folder) = chosen {
            std::fs::create_dir_all(folder).map_err(Failure::file(folder))?;
            RunFolder::check_free(folder)?;
            return Ok(RunFolder(folder.to_owned()));
        }
        let runs = Path::new("runs");
        std::fs::create_dir_all(runs).map_err(Failure::file(runs))?;
        for number in 1_u32.. {
            let folder = runs.join(format!("gpt-{number}"));
            // Creating is what decides: two runs started together get two folders.
            match std::fs::create_dir(&folder) {
                Ok(()) => return Ok(RunFolder(folder)),
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                Err(error) => return Err(Failure::file(&folder)(error)),
            }
        }
        Err(Failure::File { path: runs.to_owned(), reason: "no free number".to_owned() })
    }

    /// Fails if `folder` holds something.
    ///
    /// # Errors
    /// [`Failure::Usage`]; [`Failure::File`] if it is there but cannot be read.
    pub fn check_free(folder: &Path) -> Result<(), Failure> {
        let files = match std::fs::read_dir(folder) {
            Ok(files) => files,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(Failure::file(folder)(error)),
        };
        if files.count() == 0 {
            return Ok(());
        }
        Err(Failure::Usage(format!(
            "--run-dir {}: holds files already; go on with --resume, or choose another folder",
            folder.display()
        )))
    }

    /// The folder of a run that goes on. `run` may also be its checkpoint.
    ///
    /// # Errors
    /// [`Failure::Usage`] if there is no checkpoint.
    pub fn existing(run: &Path) -> Result<RunFolder, Failure> {
        let folder = match run.parent() {
            Some(folder) if run.is_file() => RunFolder(folder.to_owned()),
            _ => RunFolder(run.to_owned()),
        };
        if folder.checkpoint().is_file() {
            return Ok(folder);
        }
        let what = if run.exists() { "there is no checkpoint.safetensors in it" } else { "there is no such folder" };
        Err(Failure::Usage(format!("--resume {}: {what}", run.display())))
    }

    /// The folder that every rank is told by rank 0.
    pub fn told(path: PathBuf) -> RunFolder {
        RunFolder(path)
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// The checkpoint.
    pub fn checkpoint(&self) -> PathBuf {
        self.0.join("checkpoint.safetensors")
    }

    /// What the GPUs of the machine did meanwhile.
    pub fn gpus(&self) -> PathBuf {
        self.0.join("gpus.csv")
    }

    /// The timeline of all ranks.
    pub fn timeline(&self) -> PathBuf {
        self.0.join("timeline.json")
    }

    /// The timeline of one rank, until they are merged.
    pub fn timeline_of(&self, rank: u32) -> PathBuf {
        self.0.join(format!("timeline.{rank}.json"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_with_files_is_not_written_into() {
        let parent = tempfile::tempdir().unwrap();
        let chosen = parent.path().join("a/b");
        let folder = RunFolder::create(Some(&chosen)).unwrap();
        assert_eq!(folder, RunFolder::create(Some(&chosen)).unwrap(), "an empty folder will do");
        std::fs::write(folder.path().join("metrics.csv"), "").unwrap();
        let error = RunFolder::create(Some(&chosen)).unwrap_err();
        assert!(matches!(&error, Failure::Usage(text) if text.contains("--resume")), "{error}");
    }

    #[test]
    fn a_run_is_found_by_its_folder_or_its_checkpoint() {
        let run = tempfile::tempdir().unwrap();
        for (path, expected) in
            [(run.path().join("absent"), "no such folder"), (run.path().to_owned(), "no checkpoint")]
        {
            let error = RunFolder::existing(&path).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        let checkpoint = run.path().join("checkpoint.safetensors");
        std::fs::write(&checkpoint, "").unwrap();
        for path in [run.path(), &checkpoint] {
            assert_eq!(RunFolder::existing(path).unwrap().path(), run.path());
        }
    }
}
