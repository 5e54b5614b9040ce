//! Parses a template's operators; what stands between them is in [`operands`], statements are in
//! [`statements`]. How deep anything nests
//! is bounded while it is parsed, so nothing that walks the result runs out of stack.

mod operands;
mod statements;

use std::collections::HashMap;

use super::lexer::{self, Kind, Token};
use super::syntax::{BinaryOp, CompareOp, Expr, For, Macro, Specials, Statement, Symbol};
use super::{CompileError, MAX_NESTING, Program};

/// Parameters of one macro and named arguments of one call: templates have some ten. Each is
/// looked for among those before it.
const MAX_PARAMETERS: usize = 256;

/// A parsed expression and how many levels it has.
pub(super) struct Node {
    expr: Expr,
    height: usize,
}

type Parsed<T> = Result<T, CompileError>;

/// Parses `source`.
///
/// # Errors
///
/// [`CompileError`].
pub(super) fn parse(source: &str) -> Parsed<Program> {
    let mut parser = Parser {
        tokens: lexer::tokens(source)?,
        at: 0,
        depth: 0,
        symbols: HashMap::new(),
        names: Vec::new(),
        loops: Vec::new(),
        macros: Vec::new(),
        asked: Vec::new(),
        loop_depth: 0,
    };
    let body = parser.body(&[])?;
    if !matches!(parser.kind(), Kind::End) {
        return Err(parser.unexpected());
    }
    let loop_name = parser.symbols.get("loop").copied();
    let Parser { names, loops, macros, .. } = parser;
    Ok(Program { body, names, loop_name, loops, macros })
}

/// What a macro's body was seen to ask for, and what it names itself.
#[derive(Default)]
struct Asked {
    found: Specials,
    stored: Specials,
}

struct Parser {
    tokens: Vec<Token>,
    at: usize,
    /// Levels of the parser's own recursion.
    depth: usize,
    symbols: HashMap<Box<str>, Symbol>,
    names: Vec<Box<str>>,
    loops: Vec<For>,
    macros: Vec<Macro>,
    /// One for each macro that is being parsed.
    asked: Vec<Asked>,
    /// Loops around this place, up to the next macro.
    loop_depth: usize,
}

impl Parser {
    fn kind(&self) -> &Kind {
        &self.tokens[self.at].kind
    }

    fn line(&self) -> u32 {
        self.tokens[self.at].line
    }

    fn next(&mut self) {
        // The last token is the end and stays.
        self.at = (self.at + 1).min(self.tokens.len() - 1);
    }

    fn error(&self, what: impl Into<String>) -> CompileError {
        CompileError::Syntax { line: self.line(), what: what.into() }
    }

    fn unsupported(&self, what: impl Into<String>) -> CompileError {
        CompileError::Unsupported { line: self.line(), what: what.into() }
    }

    fn unexpected(&self) -> CompileError {
        let found = match self.kind() {
            Kind::Data(_) => "text",
            Kind::PrintBegin => "{{",
            Kind::PrintEnd => "}}",
            Kind::BlockBegin => "{%",
            Kind::BlockEnd => "%}",
            Kind::Name(name) => name,
            Kind::Text(_) => "a string",
            Kind::Int(_) | Kind::Float(_) => "a number",
            Kind::Sign(sign) => sign,
            Kind::End => "the end",
        };
        // A name may be as long as the template.
        let found: String = found.chars().take(64).collect();
        self.error(format!("unexpected {found:?}"))
    }

    fn is_sign(&self, sign: &str) -> bool {
        matches!(self.kind(), Kind::Sign(found) if *found == sign)
    }

    fn skip_sign(&mut self, sign: &str) -> bool {
        let found = self.is_sign(sign);
        if found {
            self.next();
        }
        found
    }

    fn expect_sign(&mut self, sign: &str) -> Parsed<()> {
        if self.skip_sign(sign) { Ok(()) } else { Err(self.unexpected()) }
    }

    fn is_name(&self, name: &str) -> bool {
        matches!(self.kind(), Kind::Name(found) if &**found == name)
    }

    fn next_is_name(&self, name: &str) -> bool {
        let next = self.tokens.get(self.at + 1).map(|token| &token.kind);
        matches!(next, Some(Kind::Name(found)) if &**found == name)
    }

    fn skip_name(&mut self, name: &str) -> bool {
        let found = self.is_name(name);
        if found {
            self.next();
        }
        found
    }

    fn expect_name(&mut self) -> Parsed<Box<str>> {
        let Kind::Name(name) = self.kind() else { return Err(self.unexpected()) };
        let name = name.clone();
        self.next();
        Ok(name)
    }

    fn symbol(&mut self, name: &str) -> Symbol {
        if let Some(&symbol) = self.symbols.get(name) {
            return symbol;
        }
        let symbol = self.names.len() as Symbol;
        self.names.push(name.into());
        self.symbols.insert(name.into(), symbol);
        symbol
    }

    /// Runs `parse` one level deeper.
    fn deeper<T>(&mut self, parse: impl FnOnce(&mut Self) -> Parsed<T>) -> Parsed<T> {
        if self.depth == MAX_NESTING {
            return Err(self.too_deep());
        }
        self.depth += 1;
        let parsed = parse(self);
        self.depth -= 1;
        parsed
    }

    fn too_deep(&self) -> CompileError {
        CompileError::TooDeep { line: self.line() }
    }

    /// An expression above others, the highest of which has `below` levels.
    fn node(&self, below: usize, expr: Expr) -> Parsed<Node> {
        if below >= MAX_NESTING {
            return Err(self.too_deep());
        }
        Ok(Node { expr, height: below + 1 })
    }

    fn expression(&mut self) -> Parsed<Node> {
        self.deeper(Self::condition)
    }

    /// `a if b else c`.
    fn condition(&mut self) -> Parsed<Node> {
        let mut value = self.or()?;
        while self.skip_name("if") {
            let test = self.or()?;
            let other = if self.skip_name("else") { Some(self.expression()?) } else { None };
            let below = value.height.max(test.height);
            let below = below.max(other.as_ref().map_or(0, |other| other.height));
            let expr = Expr::Condition {
                test: test.expr.into(),
                value: value.expr.into(),
                other: other.map(|other| other.expr.into()),
            };
            value = self.node(below, expr)?;
        }
        Ok(value)
    }

    fn pair(
        &self,
        left: Node,
        right: Node,
        make: impl FnOnce(Box<[Expr; 2]>) -> Expr,
    ) -> Parsed<Node> {
        let below = left.height.max(right.height);
        self.node(below, make([left.expr, right.expr].into()))
    }

    fn or(&mut self) -> Parsed<Node> {
        let mut left = self.and()?;
        while self.skip_name("or") {
            let right = self.and()?;
            left = self.pair(left, right, Expr::Or)?;
        }
        Ok(left)
    }

    fn and(&mut self) -> Parsed<Node> {
        let mut left = self.not()?;
        while self.skip_name("and") {
            let right = self.not()?;
            left = self.pair(left, right, Expr::And)?;
        }
        Ok(left)
    }

    fn not(&mut self) -> Parsed<Node> {
        if !self.skip_name("not") {
            return self.compare();
        }
        let value = self.deeper(Self::not)?;
        self.node(value.height, Expr::Not(value.expr.into()))
    }

    fn compare(&mut self) -> Parsed<Node> {
        let first = self.sum()?;
        let mut height = first.height;
        let mut others = Vec::new();
        loop {
            let op = match self.kind() {
                Kind::Sign("==") => CompareOp::Equal,
                Kind::Sign("!=") => CompareOp::NotEqual,
                Kind::Sign("<") => CompareOp::Less,
                Kind::Sign("<=") => CompareOp::LessEqual,
                Kind::Sign(">") => CompareOp::Greater,
                Kind::Sign(">=") => CompareOp::GreaterEqual,
                Kind::Name(name) if &**name == "in" => CompareOp::In,
                Kind::Name(name) if &**name == "not" && self.next_is_name("in") => {
                    self.next();
                    CompareOp::NotIn
                }
                _ => break,
            };
            self.next();
            let other = self.sum()?;
            height = height.max(other.height);
            others.push((op, other.expr));
        }
        if others.is_empty() {
            return Ok(first);
        }
        self.node(height, Expr::Compare(first.expr.into(), others))
    }

    fn sum(&mut self) -> Parsed<Node> {
        let mut left = self.concat()?;
        loop {
            let op = match self.kind() {
                Kind::Sign("+") => BinaryOp::Add,
                Kind::Sign("-") => BinaryOp::Subtract,
                _ => return Ok(left),
            };
            self.next();
            let right = self.concat()?;
            left = self.pair(left, right, |sides| Expr::Binary(op, sides))?;
        }
    }

    fn concat(&mut self) -> Parsed<Node> {
        let first = self.product()?;
        if !self.is_sign("~") {
            return Ok(first);
        }
        let mut height = first.height;
        let mut parts = vec![first.expr];
        while self.skip_sign("~") {
            let part = self.product()?;
            height = height.max(part.height);
            parts.push(part.expr);
        }
        self.node(height, Expr::Concat(parts))
    }

    fn product(&mut self) -> Parsed<Node> {
        let mut left = self.power()?;
        loop {
            let op = match self.kind() {
                Kind::Sign("*") => BinaryOp::Multiply,
                Kind::Sign("/") => BinaryOp::Divide,
                Kind::Sign("//") => BinaryOp::FloorDivide,
                Kind::Sign("%") => BinaryOp::Remainder,
                _ => return Ok(left),
            };
            self.next();
            let right = self.power()?;
            left = self.pair(left, right, |sides| Expr::Binary(op, sides))?;
        }
    }

    fn power(&mut self) -> Parsed<Node> {
        let mut left = self.unary(true)?;
        while self.skip_sign("**") {
            let right = self.unary(true)?;
            left = self.pair(left, right, |sides| Expr::Binary(BinaryOp::Power, sides))?;
        }
        Ok(left)
    }

    fn unary(&mut self, with_filters: bool) -> Parsed<Node> {
        let negative = self.is_sign("-");
        let node = if negative || self.is_sign("+") {
            self.next();
            let value = self.deeper(|parser| parser.unary(false))?;
            self.node(value.height, Expr::Sign { negative, value: value.expr.into() })?
        } else {
            self.primary()?
        };
        let node = self.postfix(node)?;
        if with_filters { self.filters_and_tests(node) } else { Ok(node) }
    }
}

/// The statements of a body.
type Body = Vec<Statement>;
