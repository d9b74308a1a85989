//! PTX text to [`Module`]. `scan` cuts the text into statements, `operand` and `opcode` read one instruction's parts, and
//! this file knows directives: kernels, parameters, variables, registers, scopes, labels, source lines.

mod opcode;
mod operand;
mod scan;

use std::collections::HashMap;

use crate::fault::Fault;
use crate::ptx::{Guard, Instruction, Kernel, Module, Op, Operand};
use operand::Name;
use scan::{Scanner, Statement};

pub(super) type Parsed<T> = Result<T, String>;

pub(crate) fn module(text: &str) -> Result<Module, Fault> {
    let text = scan::without_comments(text);
    let mut scanner = Scanner::new(&text);
    let mut module = Module::default();
    let mut files = Vec::new();
    let mut outer: HashMap<String, Name> = HashMap::new();
    while let Some((line, statement)) = scanner.next() {
        let fail = |what: String| Fault::Parse { line, what };
        match statement {
            Statement::Directive(words) => match words.split_whitespace().next().unwrap_or("") {
                ".version" | ".target" | ".address_size" => {}
                ".file" => files.push(file(&words).map_err(fail)?),
                ".section" => scanner.skip_block(),
                _ => return Err(fail(format!("unknown directive `{words}`"))),
            },
            Statement::Entry(header) => {
                let mut kernel = KernelParser::new(&header, outer.clone()).map_err(fail)?;
                kernel.body(&mut scanner)?;
                module.kernels.push(kernel.kernel);
            }
            Statement::Instruction(words) if words.starts_with(".extern .shared") => {
                let name = words.rsplit(' ').next().unwrap_or("").trim_end_matches("[]");
                outer.insert(name.to_owned(), Name::DynamicShared);
            }
            Statement::Instruction(words) | Statement::Label(words) => {
                return Err(fail(format!("`{words}` is not supported outside a kernel")));
            }
            Statement::Open | Statement::Close => return Err(fail("a brace outside a kernel".to_owned())),
        }
    }
    for kernel in &mut module.kernels {
        kernel.files = files.clone();
    }
    Ok(module)
}

/// `.file 1 "path"`: only the last part of the path is kept.
fn file(words: &str) -> Parsed<(u32, String)> {
    let number = words.split_whitespace().nth(1).and_then(|number| number.parse().ok());
    match (number, words.split('"').nth(1)) {
        (Some(number), Some(path)) => Ok((number, path.rsplit('/').next().unwrap_or(path).to_owned())),
        _ => Err(format!("malformed `{words}`")),
    }
}

struct KernelParser {
    kernel: Kernel,
    /// Names, innermost scope last.
    scopes: Vec<HashMap<String, Name>>,
    labels: HashMap<String, usize>,
    branches: Vec<(usize, String)>,
    source: Option<(u32, u32)>,
}

impl KernelParser {
    /// `header` is all from `.entry` to the opening brace.
    fn new(header: &str, outer: HashMap<String, Name>) -> Parsed<KernelParser> {
        let after = header.split(".entry").nth(1).unwrap_or("").trim();
        let (name, rest) = after.split_once('(').ok_or_else(|| format!("malformed entry `{header}`"))?;
        let (parameters, attributes) = rest.split_once(')').ok_or_else(|| format!("malformed entry `{header}`"))?;
        let mut parser = KernelParser {
            kernel: Kernel { name: name.trim().to_owned(), ..Kernel::default() },
            scopes: vec![outer, HashMap::new()],
            labels: HashMap::new(),
            branches: Vec::new(),
            source: None,
        };
        for declaration in parameters.split(',').map(str::trim).filter(|text| !text.is_empty()) {
            let variable = operand::variable(declaration)?;
            let offset_bytes = parser.kernel.parameter_bytes.next_multiple_of(variable.align_bytes);
            parser.kernel.parameter_bytes = offset_bytes + variable.len_bytes;
            parser.kernel.parameters.push((offset_bytes, variable.len_bytes));
            parser.declare(variable.name, Name::Offset(offset_bytes as u64));
        }
        let words: Vec<&str> = attributes.split([' ', '\n', '\t', ',']).filter(|word| !word.is_empty()).collect();
        let mut limit = None;
        for word in words {
            match (word, limit) {
                (".maxntid" | ".reqntid", _) => limit = Some(true),
                (".minnctapersm", _) => limit = Some(false),
                (number, Some(is_threads)) => {
                    let number: u32 = number.parse().map_err(|_| format!("unknown attribute `{number}`"))?;
                    if is_threads {
                        let product = parser.kernel.max_threads.unwrap_or(1).checked_mul(number);
                        parser.kernel.max_threads = Some(product.ok_or("block size overflows")?);
                    }
                }
                (word, None) => return Err(format!("unknown attribute `{word}`")),
            }
        }
        Ok(parser)
    }

    fn body(&mut self, scanner: &mut Scanner<'_>) -> Result<(), Fault> {
        let mut depth = 0;
        loop {
            let Some((line, statement)) = scanner.next() else {
                let what = format!("the text ends inside kernel `{}`", self.kernel.name);
                return Err(Fault::Parse { line: scanner.line(), what });
            };
            let fail = |what: String| Fault::Parse { line, what };
            match statement {
                Statement::Open => {
                    depth += 1;
                    self.scopes.push(HashMap::new());
                }
                Statement::Close if depth == 0 => break,
                Statement::Close => {
                    depth -= 1;
                    self.scopes.pop();
                }
                Statement::Label(label) => {
                    if self.labels.insert(label.clone(), self.kernel.instructions.len()).is_some() {
                        return Err(fail(format!("label `{label}` twice")));
                    }
                }
                Statement::Directive(words) => self.source_line(&words).map_err(fail)?,
                Statement::Instruction(words) if words.starts_with('.') => self.variable(&words).map_err(fail)?,
                Statement::Instruction(words) => self.instruction(&words, line).map_err(fail)?,
                Statement::Entry(_) => return Err(fail("a kernel inside a kernel".to_owned())),
            }
        }
        for (instruction, label) in std::mem::take(&mut self.branches) {
            let instruction = &mut self.kernel.instructions[instruction];
            let fail = || Fault::Parse { line: instruction.ptx_line, what: format!("no label `{label}`") };
            let target = *self.labels.get(&label).ok_or_else(fail)?;
            instruction.op = Op::Branch(target);
        }
        Ok(())
    }

    fn declare(&mut self, name: String, meaning: Name) {
        if let Some(scope) = self.scopes.last_mut() {
            scope.insert(name, meaning);
        }
    }

    fn name(&self, name: &str) -> Option<&Name> {
        self.scopes.iter().rev().find_map(|scope| scope.get(name))
    }

    /// `.loc file line column[, ..]`; with inlining the first place is the one in the inlined function.
    fn source_line(&mut self, words: &str) -> Parsed<()> {
        let mut words = words.split_whitespace();
        match words.next() {
            Some(".loc") => {
                let mut number = || words.next().and_then(|word| word.parse().ok());
                self.source = Some((number().ok_or("malformed .loc")?, number().ok_or("malformed .loc")?));
                Ok(())
            }
            Some(".pragma") => Ok(()),
            other => Err(format!("unknown directive `{}`", other.unwrap_or(""))),
        }
    }

    /// `.reg`, `.shared`, `.local`.
    fn variable(&mut self, words: &str) -> Parsed<()> {
        let (directive, rest) = words.split_once(' ').unwrap_or((words, ""));
        match directive {
            ".reg" => {
                let (ty, names) = rest.trim().split_once(char::is_whitespace).ok_or("malformed .reg")?;
                opcode::ty(ty.trim_start_matches('.')).ok_or_else(|| format!("unknown register type `{ty}`"))?;
                for name in names.split(',').map(str::trim) {
                    match name.split_once('<') {
                        Some((stem, count)) => {
                            let count: usize = count.trim_end_matches('>').parse().map_err(|_| "malformed .reg")?;
                            (0..count).for_each(|i| self.register(format!("{stem}{i}")));
                        }
                        None => self.register(name.to_owned()),
                    }
                }
            }
            ".shared" | ".local" => {
                let variable = operand::variable(rest)?;
                let kernel = &mut self.kernel;
                let used = if directive == ".shared" { &mut kernel.shared_bytes } else { &mut kernel.local_bytes };
                let offset_bytes = used.next_multiple_of(variable.align_bytes);
                *used = offset_bytes + variable.len_bytes;
                self.declare(variable.name, Name::Offset(offset_bytes as u64));
            }
            ".pragma" => {}
            _ => return Err(format!("unknown directive `{words}`")),
        }
        Ok(())
    }

    fn register(&mut self, name: String) {
        let number = self.kernel.registers;
        self.kernel.registers += 1;
        self.declare(name, Name::Register(number));
    }

    fn instruction(&mut self, words: &str, ptx_line: u32) -> Parsed<()> {
        let (guard, words) = match words.strip_prefix('@') {
            Some(rest) => {
                let (name, rest) = rest.split_once(char::is_whitespace).ok_or("a guard without an instruction")?;
                let negated = name.starts_with('!');
                match self.name(name.trim_start_matches('!')) {
                    Some(Name::Register(register)) => (Some(Guard { register: *register, negated }), rest.trim()),
                    _ => return Err(format!("unknown predicate `{name}`")),
                }
            }
            None => (None, words),
        };
        let (code, rest) = words.split_once(char::is_whitespace).unwrap_or((words, ""));
        let op = opcode::decode(code).map_err(|what| format!("`{words}`: {what}"))?;
        let operands = if let Op::Branch(_) = op {
            self.branches.push((self.kernel.instructions.len(), rest.trim().to_owned()));
            Vec::new()
        } else {
            let parts = operand::split(rest);
            let read = |text: &String| operand::read(text, &|name| self.name(name).cloned());
            parts.iter().map(read).collect::<Parsed<Vec<Operand>>>().map_err(|what| format!("`{words}`: {what}"))?
        };
        let accepted = opcode::operand_counts(&op);
        if !accepted.contains(&operands.len()) {
            return Err(format!("`{words}`: {} operands", operands.len()));
        }
        self.kernel.instructions.push(Instruction { op, guard, operands, ptx_line, source: self.source });
        Ok(())
    }
}
