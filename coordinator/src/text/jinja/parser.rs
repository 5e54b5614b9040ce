//! Parses a template's expressions; its statements are in [`statements`]. How deep anything nests
//! is bounded while it is parsed, so nothing that walks the result runs out of stack.

mod statements;

use std::collections::HashMap;

use super::lexer::{self, Kind, Token};
use super::names;
use super::syntax::{
    Arguments, BinaryOp, CompareOp, Expr, For, Macro, Specials, Statement, Symbol,
};
use super::{CompileError, MAX_NESTING, Program};

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

    fn primary(&mut self) -> Parsed<Node> {
        let expr = match self.kind() {
            Kind::Name(name) => {
                let name = name.clone();
                self.next();
                match &*name {
                    "true" | "True" => Expr::Bool(true),
                    "false" | "False" => Expr::Bool(false),
                    "none" | "None" => Expr::None,
                    _ => Expr::Name(self.load(&name)?),
                }
            }
            Kind::Text(text) => {
                let mut text = text.clone();
                self.next();
                while let Kind::Text(more) = self.kind() {
                    text.push_str(more);
                    self.next();
                }
                Expr::Text(text)
            }
            &Kind::Int(value) => {
                self.next();
                Expr::Int(value)
            }
            &Kind::Float(value) => {
                self.next();
                Expr::Float(value)
            }
            Kind::Sign("(") => {
                self.next();
                let node = self.tuple(true, true, &[])?;
                self.expect_sign(")")?;
                return Ok(node);
            }
            Kind::Sign("[") => return self.list(),
            Kind::Sign("{") => return self.dict(),
            _ => return Err(self.unexpected()),
        };
        self.node(0, expr)
    }

    /// A name whose value is asked for.
    fn load(&mut self, name: &str) -> Parsed<Symbol> {
        if names::UNSUPPORTED_GLOBALS.contains(&name) && !self.symbols.contains_key(name) {
            return Err(self.unsupported(format!("the function {name:?}")));
        }
        for asked in &mut self.asked {
            let Asked { found, stored } = asked;
            match name {
                "caller" => found.caller |= !stored.caller,
                "kwargs" => found.kwargs |= !stored.kwargs,
                "varargs" => found.varargs |= !stored.varargs,
                _ => {}
            }
        }
        Ok(self.symbol(name))
    }

    /// A name that is given a value.
    fn store(&mut self, name: &str) -> Symbol {
        for Asked { stored, .. } in &mut self.asked {
            match name {
                "caller" => stored.caller = true,
                "kwargs" => stored.kwargs = true,
                "varargs" => stored.varargs = true,
                _ => {}
            }
        }
        self.symbol(name)
    }

    fn ends_tuple(&self, ends: &[&str]) -> bool {
        match self.kind() {
            Kind::PrintEnd | Kind::BlockEnd | Kind::Sign(")") => true,
            Kind::Name(name) => ends.contains(&&**name),
            _ => false,
        }
    }

    /// One expression, or several with commas between them.
    fn tuple(&mut self, parenthesised: bool, conditions: bool, ends: &[&str]) -> Parsed<Node> {
        let mut items = Vec::new();
        let mut height = 0;
        let mut is_tuple = false;
        loop {
            if !items.is_empty() {
                self.expect_sign(",")?;
            }
            if self.ends_tuple(ends) {
                break;
            }
            let item = if conditions { self.expression()? } else { self.deeper(Self::or)? };
            if items.is_empty() && !self.is_sign(",") {
                return Ok(item);
            }
            height = height.max(item.height);
            items.push(item.expr);
            if !self.is_sign(",") {
                break;
            }
            is_tuple = true;
        }
        if !is_tuple && !parenthesised {
            return Err(self.unexpected());
        }
        self.node(height, Expr::Tuple(items))
    }

    fn list(&mut self) -> Parsed<Node> {
        self.next();
        let mut items = Vec::new();
        let mut height = 0;
        while !self.is_sign("]") {
            if !items.is_empty() {
                self.expect_sign(",")?;
                if self.is_sign("]") {
                    break;
                }
            }
            let item = self.expression()?;
            height = height.max(item.height);
            items.push(item.expr);
        }
        self.expect_sign("]")?;
        self.node(height, Expr::List(items))
    }

    fn dict(&mut self) -> Parsed<Node> {
        self.next();
        let mut entries = Vec::new();
        let mut height = 0;
        while !self.is_sign("}") {
            if !entries.is_empty() {
                self.expect_sign(",")?;
                if self.is_sign("}") {
                    break;
                }
            }
            let key = self.expression()?;
            self.expect_sign(":")?;
            let value = self.expression()?;
            height = height.max(key.height).max(value.height);
            entries.push((key.expr, value.expr));
        }
        self.expect_sign("}")?;
        self.node(height, Expr::Dict(entries))
    }

    fn postfix(&mut self, mut node: Node) -> Parsed<Node> {
        loop {
            node = match self.kind() {
                Kind::Sign(".") => self.dot(node)?,
                Kind::Sign("[") => self.subscript(node)?,
                Kind::Sign("(") => self.call(node)?,
                _ => return Ok(node),
            };
        }
    }

    fn filters_and_tests(&mut self, mut node: Node) -> Parsed<Node> {
        loop {
            node = match self.kind() {
                Kind::Sign("|") => self.filter(Some(node))?,
                Kind::Name(name) if &**name == "is" => self.test(node)?,
                Kind::Sign("(") => self.call(node)?,
                _ => return Ok(node),
            };
        }
    }

    fn dot(&mut self, value: Node) -> Parsed<Node> {
        self.next();
        match self.kind() {
            Kind::Name(name) => {
                let name = name.clone();
                self.next();
                self.node(value.height, Expr::Attribute(value.expr.into(), name))
            }
            &Kind::Int(index) => {
                self.next();
                let expr = Expr::Item(value.expr.into(), Expr::Int(index).into());
                self.node(value.height, expr)
            }
            _ => Err(self.error("expected name or number")),
        }
    }

    fn subscript(&mut self, value: Node) -> Parsed<Node> {
        self.next();
        if self.is_sign("]") {
            // Python: an empty tuple as the key.
            self.next();
            let expr = Expr::Item(value.expr.into(), Expr::Tuple(Vec::new()).into());
            return self.node(value.height, expr);
        }
        let first = if self.is_sign(":") { None } else { Some(self.expression()?) };
        if self.is_sign(":") {
            let mut height = value.height.max(first.as_ref().map_or(0, |first| first.height));
            let mut bounds = [first.map(|first| first.expr), None, None];
            for bound in &mut bounds[1..] {
                if !self.skip_sign(":") {
                    break;
                }
                if !(self.is_sign(":") || self.is_sign("]") || self.is_sign(",")) {
                    let parsed = self.expression()?;
                    height = height.max(parsed.height);
                    *bound = Some(parsed.expr);
                }
            }
            if self.is_sign(",") {
                return Err(self.unsupported("a slice among other subscripts"));
            }
            self.expect_sign("]")?;
            return self.node(height, Expr::Slice(value.expr.into(), bounds.into()));
        }
        let Some(first) = first else { return Err(self.unexpected()) };
        let mut height = value.height.max(first.height);
        let mut keys = vec![first.expr];
        while self.skip_sign(",") {
            let key = self.expression()?;
            if self.is_sign(":") {
                return Err(self.unsupported("a slice among other subscripts"));
            }
            height = height.max(key.height);
            keys.push(key.expr);
        }
        self.expect_sign("]")?;
        let key = match keys.pop() {
            Some(only) if keys.is_empty() => only,
            last => {
                keys.extend(last);
                height += 1;
                Expr::Tuple(keys)
            }
        };
        self.node(height, Expr::Item(value.expr.into(), key.into()))
    }

    fn call(&mut self, callee: Node) -> Parsed<Node> {
        if let Expr::Attribute(_, name) = &callee.expr
            && names::UNSUPPORTED_METHODS.contains(&&**name)
        {
            return Err(self.unsupported(format!("the method {name:?}")));
        }
        let (arguments, height) = self.arguments()?;
        let expr = Expr::Call(callee.expr.into(), arguments.into());
        self.node(callee.height.max(height), expr)
    }

    /// What stands in parentheses, and its height.
    fn arguments(&mut self) -> Parsed<(Arguments, usize)> {
        self.expect_sign("(")?;
        let mut out = Arguments::default();
        let mut height = 0;
        let mut any = false;
        while !self.is_sign(")") {
            if any {
                self.expect_sign(",")?;
                if self.is_sign(")") {
                    break;
                }
            }
            any = true;
            let ok = if self.skip_sign("*") {
                let more = self.expression()?;
                height = height.max(more.height);
                out.more_keyword.is_none() && out.more.replace(more.expr).is_none()
            } else if self.skip_sign("**") {
                let more = self.expression()?;
                height = height.max(more.height);
                out.more_keyword.replace(more.expr).is_none()
            } else if let (Kind::Name(name), Some(Token { kind: Kind::Sign("="), .. })) =
                (self.kind(), self.tokens.get(self.at + 1))
            {
                let name = name.clone();
                self.next();
                self.next();
                let value = self.expression()?;
                height = height.max(value.height);
                let twice = out.keyword.iter().any(|(other, _)| *other == name);
                out.keyword.push((name, value.expr));
                out.more_keyword.is_none() && !twice
            } else {
                let value = self.expression()?;
                height = height.max(value.height);
                out.positional.push(value.expr);
                out.more.is_none() && out.more_keyword.is_none() && out.keyword.is_empty()
            };
            if !ok {
                return Err(self.error("invalid syntax for function call expression"));
            }
        }
        self.expect_sign(")")?;
        Ok((out, height))
    }

    /// A filter's or test's name.
    fn dotted_name(&mut self) -> Parsed<String> {
        let mut name = self.expect_name()?.into_string();
        while self.skip_sign(".") {
            name.push('.');
            name.push_str(&self.expect_name()?);
        }
        Ok(name)
    }

    /// `| name(…)`, or without the `|` in a block's opening.
    fn filter(&mut self, value: Option<Node>) -> Parsed<Node> {
        self.skip_sign("|");
        let name = self.dotted_name()?;
        if !names::FILTERS.contains(&&*name) {
            let name: String = name.chars().take(64).collect();
            return Err(self.unsupported(format!("the filter {name:?}")));
        }
        let (arguments, height) =
            if self.is_sign("(") { self.arguments()? } else { Default::default() };
        self.check_named(&name, &arguments)?;
        let height = height.max(value.as_ref().map_or(0, |value| value.height));
        let value = value.map(|value| value.expr.into());
        self.node(height, Expr::Filter(value, name.into(), arguments.into()))
    }

    /// Filters and tests that a filter is given by name.
    fn check_named(&self, filter: &str, arguments: &Arguments) -> Parsed<()> {
        let place = match filter {
            "map" | "select" | "reject" => 0,
            "selectattr" | "rejectattr" => 1,
            _ => return Ok(()),
        };
        let Some(Expr::Text(name)) = arguments.positional.get(place) else { return Ok(()) };
        let (kind, known) = match filter {
            "map" => ("filter", names::FILTERS.contains(&&**name)),
            _ => ("test", names::TESTS.contains(&&**name)),
        };
        if known {
            return Ok(());
        }
        let name: String = name.chars().take(64).collect();
        Err(self.unsupported(format!("the {kind} {name:?}")))
    }

    fn test(&mut self, value: Node) -> Parsed<Node> {
        self.next();
        let negated = self.skip_name("not");
        let name = self.dotted_name()?;
        if !names::TESTS.contains(&&*name) {
            let name: String = name.chars().take(64).collect();
            return Err(self.unsupported(format!("the test {name:?}")));
        }
        let takes_one = match self.kind() {
            Kind::Name(name) => !matches!(&**name, "else" | "or" | "and"),
            Kind::Text(_) | Kind::Int(_) | Kind::Float(_) | Kind::Sign("[" | "{") => true,
            _ => false,
        };
        let (arguments, height) = if self.is_sign("(") {
            self.arguments()?
        } else if takes_one {
            if self.is_name("is") {
                return Err(self.error("you cannot chain multiple tests with is"));
            }
            let argument = self.primary()?;
            let argument = self.postfix(argument)?;
            let arguments = Arguments { positional: vec![argument.expr], ..Arguments::default() };
            (arguments, argument.height)
        } else {
            Default::default()
        };
        let height = height.max(value.height);
        let node =
            self.node(height, Expr::Test(value.expr.into(), name.into(), arguments.into()))?;
        if !negated {
            return Ok(node);
        }
        self.node(node.height, Expr::Not(node.expr.into()))
    }
}

/// The statements of a body.
type Body = Vec<Statement>;
