//! The text of tokens that come one after the other.

use anyhow::Result;

use super::TextTokenizer;

/// The character in which a text ends whose last token has only a part of a character.
const INCOMPLETE: char = char::REPLACEMENT_CHARACTER;

/// A text that grows token by token, until one of its stop texts is in it.
pub struct TextStream<'a> {
    tokenizer: &'a TextTokenizer,
    stop: &'a [String],
    text: String,
    /// Tokens from `window` to `settled` are in `text`; those before `window` do not change how the next ones decode.
    window: usize,
    settled: usize,
    /// Bytes of `text` that have been taken.
    taken: usize,
    /// The place of the stop text.
    end: Option<usize>,
}

impl<'a> TextStream<'a> {
    /// Makes an empty text that ends before the first of `stop`, none of which is empty.
    pub fn new(tokenizer: &'a TextTokenizer, stop: &'a [String]) -> TextStream<'a> {
        TextStream { tokenizer, stop, text: String::new(), window: 0, settled: 0, taken: 0, end: None }
    }

    /// Takes in the last of `tokens`, which are all tokens of the text. Returns whether a stop text is there.
    pub fn grow(&mut self, tokens: &[u32]) -> Result<bool> {
        let decode = |tokens: &[u32]| self.tokenizer.decode(tokens, true);
        let (known, all) = (decode(&tokens[self.window..self.settled])?, decode(&tokens[self.window..])?);
        let Some(new) = all.strip_prefix(&known).filter(|new| !new.is_empty() && !new.ends_with(INCOMPLETE)) else {
            return Ok(false);
        };
        let longest = self.stop.iter().map(String::len).max().unwrap_or(0);
        // A stop text may have begun in what was there before.
        let from = (0..=self.text.len().saturating_sub(longest)).rev().find(|&at| self.text.is_char_boundary(at));
        let from = from.unwrap_or(0);
        self.text += new;
        (self.window, self.settled) = (self.settled, tokens.len());
        self.end = self.stop.iter().filter_map(|stop| self.text[from..].find(stop)).min().map(|at| from + at);
        Ok(self.end.is_some())
    }

    /// Returns text that has not been returned before and that no later token takes back. The beginning of a stop text
    /// is held back.
    pub fn take(&mut self) -> &str {
        let text = &self.text[..self.end.unwrap_or(self.text.len())];
        let begins_stop =
            |at: &usize| self.end.is_none() && self.stop.iter().any(|stop| stop.starts_with(&text[*at..]));
        let tail = (self.taken..text.len()).filter(|&at| text.is_char_boundary(at));
        let until = tail.into_iter().find(begins_stop).unwrap_or(text.len()).max(self.taken);
        let taken = std::mem::replace(&mut self.taken, until);
        &self.text[taken..until]
    }

    /// Returns the whole text of `tokens`, without the stop text and what follows it.
    pub fn finish(&self, tokens: &[u32]) -> Result<String> {
        match self.end {
            Some(end) => Ok(self.text[..end].to_string()),
            None => self.tokenizer.decode(tokens, true),
        }
    }

    /// Bytes of the text that [`TextStream::take`] has returned.
    pub fn taken(&self) -> usize {
        self.taken
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::tokenizer::tests::GOLDEN;
    use super::*;

    /// Feeds a text token by token. Returns what was taken on the way, the whole text, and whether it was stopped.
    fn feed(text: &str, stop: &[&str]) -> (Vec<String>, String, bool) {
        let tokenizer = TextTokenizer::load(Path::new(GOLDEN), &jiff::Zoned::now()).unwrap();
        let (tokens, stop) =
            (tokenizer.encode(text, false).unwrap(), stop.iter().map(|s| s.to_string()).collect::<Vec<_>>());
        let (mut stream, mut taken) = (TextStream::new(&tokenizer, &stop), Vec::new());
        for n in 1..=tokens.len() {
            let ends = stream.grow(&tokens[..n]).unwrap();
            taken.push(stream.take().to_string());
            if ends {
                return (taken, stream.finish(&tokens[..n]).unwrap(), true);
            }
        }
        let whole = stream.finish(&tokens).unwrap();
        taken.push(whole[stream.taken()..].to_string());
        (taken, whole, false)
    }

    #[test]
    fn the_pieces_are_the_whole_text() {
        for text in ["the quick brown fox", "naïve 日本語 🦊🦊 ok", "a\n\n  b", "é", " x "] {
            let (taken, whole, stopped) = feed(text, &[]);
            assert_eq!((taken.concat().as_str(), whole.as_str(), stopped), (text, text, false));
            assert!(taken.iter().all(|piece| !piece.contains(INCOMPLETE)), "{taken:?}");
        }
    }

    #[test]
    fn a_text_ends_before_its_stop_text() {
        for (text, stop, expected) in [
            ("the quick brown fox", &["brown"][..], "the quick "),
            ("the quick brown fox", &["wn f", "quick brown"], "the "),
            ("one\n\ntwo", &["\n\n"], "one"),
            ("日本語", &["語"], "日本"),
            ("the quick", &["the"], ""),
        ] {
            let (taken, whole, stopped) = feed(text, stop);
            assert_eq!((taken.concat().as_str(), whole.as_str(), stopped), (expected, expected, true), "{text}");
        }
        let (taken, whole, stopped) = feed("the quick bro", &["brown"]);
        assert_eq!((taken.concat().as_str(), whole.as_str(), stopped), ("the quick bro", "the quick bro", false));
    }
}
