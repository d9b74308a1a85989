//! What a run is going to do, checked before any rank meets another.

use std::path::PathBuf;

use annulus::strategy::checkpoint::Checkpoint;
use serde::{Deserialize, Serialize};

use crate::failure::Failure;
use crate::folder::RunFolder;
use crate::settings::{Cli, Settings};
use crate::text::Text;

/// What a checkpoint says of its run, beside model, optimizer and place in the data.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Saved {
    settings: Settings,
    /// By which a resumed run knows its text.
    text_len_bytes: usize,
    text_checksum: u64,
    /// Optimizer steps made.
    pub step: u64,
}

impl Saved {
    /// Of a run that has made `step` steps.
    pub fn new(settings: &Settings, text: &Text, step: u64) -> Saved {
        Saved { settings: settings.clone(), text_len_bytes: text.len_bytes(), text_checksum: text.checksum(), step }
    }

    fn read(folder: &RunFolder) -> Result<Saved, Failure> {
        let path = folder.checkpoint();
        let saved: Option<Saved> = Checkpoint::open(&path)?.value("run")?;
        saved.ok_or_else(|| Failure::File { path, reason: "is a checkpoint, but not of annulus-gpt".to_owned() })
    }
}

/// A run that can begin.
pub struct Plan {
    /// From the command line, or from the checkpoint.
    pub settings: Settings,
    /// What is learnt.
    pub text: Text,
    /// The run that goes on, if one does.
    pub resumed: Option<RunFolder>,
    /// Folder of a new run, if one was chosen.
    pub run_dir: Option<PathBuf>,
    /// Steps to make before stopping as if asked to.
    pub stop_after: Option<u64>,
}

impl Plan {
    /// What the command line asks of `world_size` ranks.
    ///
    /// # Errors
    /// [`Failure::Usage`] naming the option that cannot be; [`Failure::Annulus`] or [`Failure::File`] for a checkpoint or text
    /// that cannot be read.
    pub fn new(cli: &Cli, world_size: u32) -> Result<Plan, Failure> {
        let resumed = match &cli.resume {
            Some(run) => {
                let folder = RunFolder::existing(run)?;
                let saved = Saved::read(&folder)?;
                Some((folder, saved))
            }
            None => None,
        };
        let settings = match &resumed {
            Some((_, saved)) => saved.settings.clone().resumed(&cli.given)?,
            None => Settings::new(&cli.given, cli.short),
        };
        settings.check(world_size)?;
        let text = Text::open(settings.text.as_deref(), settings.context)?;
        if let Some((_, saved)) = &resumed {
            if (saved.text_len_bytes, saved.text_checksum) != (text.len_bytes(), text.checksum()) {
                return Err(Failure::Usage(format!(
                    "--resume: the text has changed; the run has read one of {} bytes, this one has {}",
                    saved.text_len_bytes,
                    text.len_bytes()
                )));
            }
            if saved.step >= settings.steps {
                return Err(Failure::Usage(format!(
                    "--resume: the run has made its {} steps; --steps N goes on to a later one",
                    saved.step
                )));
            }
        }
        let windows = text.train(settings.context).len();
        if windows < settings.batch {
            return Err(Failure::Usage(format!(
                "--batch {}: the text has only {windows} windows of --context {}",
                settings.batch, settings.context
            )));
        }
        let resumed = resumed.map(|(folder, _)| folder);
        Ok(Plan { settings, text, resumed, run_dir: cli.run_dir.clone(), stop_after: cli.stop_after })
    }

    /// Fails if the chosen folder of a new run is taken. It is made later, by rank 0.
    ///
    /// # Errors
    /// [`Failure::Usage`]; [`Failure::File`].
    pub fn check_run_dir(&self) -> Result<(), Failure> {
        self.run_dir.as_deref().map_or(Ok(()), RunFolder::check_free)
    }
}
