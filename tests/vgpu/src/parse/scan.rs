//! Text to statements, each with its line.

/// One statement. Texts are trimmed and hold single blanks between words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Statement {
    /// Ends with the line: `.version`, `.loc` ...
    Directive(String),
    /// From `.entry` up to the brace.
    Entry(String),
    Label(String),
    Open,
    Close,
    /// Ends with a semicolon; declarations too.
    Instruction(String),
}

/// The text with comments blanked; lines keep their numbers.
pub(super) fn without_comments(text: &str) -> String {
    let mut clean = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find("//").into_iter().chain(rest.find("/*")).min() {
        clean.push_str(&rest[..at]);
        let (comment, after) = if rest[at..].starts_with("//") {
            rest[at..].split_at(rest[at..].find('\n').unwrap_or(rest.len() - at))
        } else {
            rest[at..].split_at(rest[at..].find("*/").map_or(rest.len() - at, |end| end + 2))
        };
        clean.extend(comment.chars().filter(|c| *c == '\n'));
        rest = after;
    }
    clean.push_str(rest);
    clean
}

pub(super) struct Scanner<'a> {
    rest: &'a str,
    line: u32,
}

impl<'a> Scanner<'a> {
    pub fn new(text: &'a str) -> Scanner<'a> {
        Scanner { rest: text, line: 1 }
    }

    pub fn line(&self) -> u32 {
        self.line
    }

    /// The next statement and the line on which it begins.
    pub fn next(&mut self) -> Option<(u32, Statement)> {
        let blank = self.rest.len() - self.rest.trim_start().len();
        self.take(blank);
        let line = self.line;
        let statement = match self.rest.chars().next()? {
            '{' => {
                self.take(1);
                Statement::Open
            }
            '}' => {
                self.take(1);
                Statement::Close
            }
            '.' if is_line_directive(self.rest) => {
                Statement::Directive(words(self.take(self.rest.find('\n').unwrap_or(self.rest.len()))))
            }
            '.' if self.is_entry() => {
                let header = words(self.take(self.rest.find('{').unwrap_or(self.rest.len())));
                self.take(self.rest.len().min(1));
                Statement::Entry(header)
            }
            _ => match self.rest.find([';', ':', '{']) {
                Some(end) if self.rest[end..].starts_with(':') => {
                    let label = words(self.take(end));
                    self.take(1);
                    Statement::Label(label)
                }
                _ => {
                    let text = words(self.take(self.rest.find(';').unwrap_or(self.rest.len())));
                    self.take(self.rest.len().min(1));
                    Statement::Instruction(text)
                }
            },
        };
        Some((line, statement))
    }

    /// Skips from here to the brace that closes the next block.
    pub fn skip_block(&mut self) {
        let mut depth = 0;
        let end = self.rest.char_indices().find_map(|(at, c)| {
            depth += i32::from(c == '{') - i32::from(c == '}');
            (c == '}' && depth == 0).then_some(at + 1)
        });
        self.take(end.unwrap_or(self.rest.len()));
    }

    fn is_entry(&self) -> bool {
        let head = &self.rest[..self.rest.find(['(', ';', '{']).unwrap_or(self.rest.len())];
        head.split_whitespace().any(|word| word == ".entry")
    }

    fn take(&mut self, len_bytes: usize) -> &'a str {
        let (taken, rest) = self.rest.split_at(len_bytes);
        self.line += taken.matches('\n').count() as u32;
        self.rest = rest;
        taken
    }
}

fn is_line_directive(text: &str) -> bool {
    let word = text.split_whitespace().next().unwrap_or("");
    matches!(word, ".version" | ".target" | ".address_size" | ".file" | ".loc" | ".section")
}

fn words(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}
