//! Parses the command line, runs the command, prints the error chain once, and ends every rank.
#![expect(clippy::print_stderr, reason = "prints errors of the command line as clap renders them")]

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::IsTerminal;

use clap::Parser;
use fsdp_qlora::{
    Cli, Disagreement, LogFormat, Outcome, RecipeError, STOPPED, World, abort, claim_signals, install_log, is_guarded,
    is_json_log, launcher_rank, listen_for_signals, log_error, watch,
};

fn main() {
    let cli = match Cli::try_parse() {
        Ok(cli) => Ok(cli),
        // Help and version are no errors and need no MPI.
        Err(error) if !error.use_stderr() => error.exit(),
        Err(error) => Err(error),
    };
    let trains = cli.as_ref().is_ok_and(Cli::trains);
    // A signal that comes while MPI starts stops the run as soon as that is done.
    let claimed = if trains { claim_signals() } else { Ok(()) };
    let world = match claimed.and_then(|()| World::init()) {
        Ok(world) => world,
        Err(error) => fail(&error, &prefix(launcher_rank(), 1)),
    };
    let (log_format, quiet) = cli.as_ref().map_or_else(|_| (LogFormat::asked_for(), false), Cli::log);
    install_log(world.rank, log_format, quiet);
    let prefix = prefix(world.rank, world.world_size);
    end_all_ranks_on_panic(prefix.clone());
    if trains && let Err(error) = listen_for_signals(&world) {
        fail(&error, &prefix);
    }
    // After an error the world is not dropped, because dropping it waits for the other ranks.
    let outcome = match cli.map_err(anyhow::Error::from).and_then(|cli| cli.run(&world)) {
        Ok(outcome) => outcome,
        Err(error) => fail(&error, &prefix),
    };
    if let Err(error) = world.end() {
        fail(&error, &prefix);
    }
    if let Outcome::Stopped { .. } = outcome {
        std::process::exit(STOPPED);
    }
}

/// Prints an error chain, on one rank if several fail alike, and ends all ranks. The exit status is 2 for a request
/// that is not valid, and 1 for every other error.
fn fail(error: &anyhow::Error, prefix: &str) -> ! {
    let refused = error.is::<RecipeError>() || error.is::<clap::Error>() || error.is::<Disagreement>();
    let status = if refused { 2 } else { 1 };
    if watch::takes_the_word(true, watch::End::Failed, &format!("{error:#}")) {
        match error.downcast_ref::<clap::Error>() {
            Some(usage) if is_json_log() => log_error(prefix, usage.render().to_string().trim_end()),
            Some(usage) if std::io::stderr().is_terminal() => eprint!("{}", usage.render().ansi()),
            Some(usage) => eprint!("{}", usage.render()),
            None => log_error(prefix, &format!("error: {error:#}")),
        }
    }
    abort(status);
}

/// Returns the prefix that names the rank if there are several.
fn prefix(rank: usize, world_size: usize) -> String {
    if world_size > 1 || rank > 0 { format!("rank {rank}: ") } else { String::new() }
}

/// Makes a panic on any thread of any rank end the job, except where it becomes an error. Unwinding would wait for the other
/// ranks in MPI_Finalize.
fn end_all_ranks_on_panic(prefix: String) {
    std::panic::set_hook(Box::new(move |info| {
        if is_guarded() {
            return;
        }
        let text = info.payload().downcast_ref::<String>();
        if let Some(why) = text.and_then(|text| text.strip_prefix("failed printing to stdout: ")) {
            // Nobody waits for a word where the reader of standard output is gone, but on a full disk a result is lost.
            let why = format!("standard output: {why}");
            if !why.contains("Broken pipe") && watch::takes_the_word(false, watch::End::Failed, &why) {
                log_error(&prefix, &format!("error: {why}"));
            }
            abort(1);
        }
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("unnamed");
        let mut text = format!("thread '{name}' {info}");
        let backtrace = Backtrace::capture();
        match backtrace.status() {
            BacktraceStatus::Captured => text += &format!("\n{backtrace}"),
            _ => text += "\nnote: RUST_BACKTRACE=1 shows where it came from",
        }
        if watch::takes_the_word(false, watch::End::Failed, &text) {
            log_error(&prefix, &text);
        }
        abort(1);
    }));
}
