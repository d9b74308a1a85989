//! `annulus completions`: what a shell needs to complete this program's arguments.

use std::process::ExitCode;

use clap_complete::Shell;

/// Print completions for a shell.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  annulus completions bash > ~/.local/share/bash-completion/completions/annulus
  annulus completions zsh  > \"${fpath[1]}/_annulus\"
  annulus completions fish > ~/.config/fish/completions/annulus.fish")]
pub(crate) struct Arguments {
    /// The shell.
    #[arg(value_enum)]
    shell: Shell,
}

/// Completes `program`.
pub(crate) fn run(arguments: &Arguments, mut program: clap::Command) -> ExitCode {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut program, "annulus", &mut script);
    match std::io::Write::write_all(&mut std::io::stdout(), &script) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("annulus: writing the completions: {error}");
            ExitCode::FAILURE
        }
    }
}
