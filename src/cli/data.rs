//! `data`: prints the rows of a recipe as they will be trained. Only rank 0 works if there are several ranks.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use serde_json::json;

use crate::data::dataset::MAX_FIRST_ROWS;
use crate::data::preview::{DocumentPreview, Lengths, Preview, TokenPreview};
use crate::files::{counted, escaped};
use crate::model::spec::ModelSpec;
use crate::recipe::{self, Command};
use crate::start::Start;
use crate::start::data::previews;

/// Columns of a line of tokens.
const WIDTH: usize = 110;

#[derive(Args)]
pub struct DataArgs {
    /// The recipe
    #[arg(short, long, default_value = "fsdp-qlora.yaml", value_parser = recipe::read_path)]
    config: PathBuf,
    /// Number of rows to print token by token
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(..=MAX_FIRST_ROWS as i64))]
    rows: u32,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Prints the first rows, and counts of what has become of all rows.
pub fn run(start: &Start, args: &DataArgs, overrides: &[String]) -> Result<()> {
    let job = Start::job_of_one(recipe::load(&args.config, Command::Data, overrides)?)?;
    let config = ModelSpec::load(&job.model)?;
    let (train, eval) = previews(start, &job, &config, args.rows as usize)?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&json!({"train": train, "eval": eval}))?);
        return Ok(());
    }
    print("training data", &train);
    if let Some(eval) = &eval {
        println!();
        print("evaluation data", eval);
    }
    Ok(())
}

fn print(name: &str, preview: &Preview) {
    println!("{name}");
    for row in &preview.first_rows {
        println!("\n{}", escaped(&row.place));
        if row.documents.is_empty() {
            println!("  nothing is left of this row");
        }
        row.documents.iter().for_each(print_document);
    }
    println!();
    let Preview { counts, lengths, overlong_at, without_target_at, .. } = preview;
    let Lengths { shortest, median, percentile_90, percentile_99, longest } = lengths;
    let limit = counts.max_length;
    for (what, number) in [
        ("rows", counts.rows.to_string()),
        ("documents", preview.documents.to_string()),
        ("sequences", counts.sequences.to_string()),
        ("tokens", counts.tokens.to_string()),
        ("tokens that count in the loss", counts.target_tokens.to_string()),
        ("tokens of a document: shortest", shortest.to_string()),
        ("median", median.to_string()),
        ("90 % have at most", percentile_90.to_string()),
        ("99 % have at most", percentile_99.to_string()),
        ("longest", longest.to_string()),
        (&format!("share of {limit} tokens that sequences fill"), format!("{:.1} %", 100.0 * preview.filled)),
    ] {
        println!("{what:>46}  {number}");
    }
    for (what, number, places) in [
        (&*format!("truncated to {limit} tokens"), counts.truncated, overlong_at),
        (&*format!("over {limit} tokens and split"), counts.split, overlong_at),
        (&*format!("over {limit} tokens and dropped"), counts.dropped, overlong_at),
        ("dropped because no token of them counts", counts.without_target, without_target_at),
    ] {
        if number > 0 {
            println!("{what:>46}  {number}: {}", escaped(&places.to_string()));
        }
    }
    preview.notes.iter().for_each(|note| println!("note: {note}"));
}

/// Prints the tokens with their ids, those that count and those that do not on lines of their own.
fn print_document(document: &DocumentPreview) {
    let DocumentPreview { sequence, targets, tokens, .. } = document;
    println!("  document of sequence {sequence}: {}, {targets} of them count", counted(tokens.len(), "token"));
    for run in tokens.chunk_by(|a, b| a.target == b.target) {
        let label = if run[0].target { "counts" } else { "" };
        lines(run).into_iter().for_each(|line| println!("  {label:>6} │ {line}"));
    }
    println!("  {:>6} └ end of the document", "");
}

/// Breaks tokens into lines.
fn lines(tokens: &[TokenPreview]) -> Vec<String> {
    let mut lines = vec![String::new()];
    for TokenPreview { id, token, .. } in tokens {
        let text = token.as_ref().map_or(id.to_string(), |token| format!("{id}:{}", escaped(token)));
        match lines.last_mut() {
            Some(line) if line.is_empty() => *line = text,
            Some(line) if line.chars().count() + text.chars().count() < WIDTH => *line += &format!(" {text}"),
            _ => lines.push(text),
        }
    }
    lines
}
