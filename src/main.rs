//! Parses, dispatches, prints the error chain once, and ends every rank.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::IsTerminal;
use std::time::Duration;

use clap::Parser;
use fsdp_qlora::cli::Cli;
use fsdp_qlora::comm::mpi::{World, abort};
use fsdp_qlora::recipe::RecipeError;
use fsdp_qlora::stderr;

/// How long the other ranks leave the word to rank 0 when all fail alike.
const RANK_0_FIRST: Duration = Duration::from_secs(1);

fn main() {
    let cli = match Cli::try_parse() {
        Ok(cli) => Ok(cli),
        // Help and version are no errors, and need no MPI.
        Err(error) if !error.use_stderr() => error.exit(),
        Err(error) => Err(error),
    };
    let world = match World::init() {
        Ok(world) => world,
        Err(error) => {
            stderr::line(&format!("error: {error:#}"));
            std::process::exit(1);
        }
    };
    end_all_ranks_on_panic(world.rank, world.world_size);
    let result = cli.map_err(anyhow::Error::from).and_then(|cli| cli.run(&world));
    if let Err(error) = result {
        if world.rank != 0 {
            std::thread::sleep(RANK_0_FIRST);
        }
        let status = match (error.downcast_ref::<RecipeError>(), error.downcast_ref::<clap::Error>()) {
            (None, None) => 1,
            _ => 2,
        };
        match error.downcast_ref::<clap::Error>() {
            Some(usage) if std::io::stderr().is_terminal() => eprint!("{}", usage.render().ansi()),
            Some(usage) => eprint!("{}", usage.render()),
            None => stderr::line(&format!("{}error: {error:#}", prefix(world.rank, world.world_size))),
        }
        abort(status);
    }
}

/// Names the rank where there are several.
fn prefix(rank: usize, world_size: usize) -> String {
    if world_size > 1 { format!("rank {rank}: ") } else { String::new() }
}

/// A panic on any thread of any rank ends the job: unwinding would wait for the other ranks in MPI_Finalize.
fn end_all_ranks_on_panic(rank: usize, world_size: usize) {
    std::panic::set_hook(Box::new(move |info| {
        // Whoever read standard output has gone: there is nobody to tell.
        if info.payload().downcast_ref::<String>().is_some_and(|text| text.starts_with("failed printing to stdout")) {
            abort(1);
        }
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("unnamed");
        let mut text = format!("{}thread '{name}' {info}", prefix(rank, world_size));
        let backtrace = Backtrace::capture();
        match backtrace.status() {
            BacktraceStatus::Captured => text += &format!("\n{backtrace}"),
            _ => text += "\nnote: RUST_BACKTRACE=1 shows where it came from",
        }
        stderr::line(&text);
        abort(1);
    }));
}
