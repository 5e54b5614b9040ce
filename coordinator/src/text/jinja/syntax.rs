//! What a template is made of once it is parsed.

/// A name's number among the names of its template.
pub(super) type Symbol = u32;

/// An expression.
#[derive(Debug)]
pub(super) enum Expr {
    None,
    Bool(bool),
    Int(i128),
    Float(f64),
    Text(String),
    Name(Symbol),
    List(Vec<Expr>),
    Tuple(Vec<Expr>),
    Dict(Vec<(Expr, Expr)>),
    Attribute(Box<Expr>, Box<str>),
    Item(Box<Expr>, Box<Expr>),
    /// `value[start:stop:step]`.
    Slice(Box<Expr>, Box<[Option<Expr>; 3]>),
    Call(Box<Expr>, Box<Arguments>),
    /// Without a value: what a block wrote.
    Filter(Option<Box<Expr>>, Box<str>, Box<Arguments>),
    Test(Box<Expr>, Box<str>, Box<Arguments>),
    Not(Box<Expr>),
    Sign {
        negative: bool,
        value: Box<Expr>,
    },
    Binary(BinaryOp, Box<[Expr; 2]>),
    And(Box<[Expr; 2]>),
    Or(Box<[Expr; 2]>),
    Compare(Box<Expr>, Vec<(CompareOp, Expr)>),
    Concat(Vec<Expr>),
    /// `value if test else other`.
    Condition {
        test: Box<Expr>,
        value: Box<Expr>,
        other: Option<Box<Expr>>,
    },
}

/// What stands in the parentheses of a call.
#[derive(Debug, Default)]
pub(super) struct Arguments {
    pub(super) positional: Vec<Expr>,
    pub(super) keyword: Vec<(Box<str>, Expr)>,
    /// `*list`.
    pub(super) more: Option<Expr>,
    /// `**dict`.
    pub(super) more_keyword: Option<Expr>,
}

/// Arithmetic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BinaryOp {
    Add,
    Subtract,
    Multiply,
    Divide,
    FloorDivide,
    Remainder,
    Power,
}

impl BinaryOp {
    /// As it is written.
    pub(super) fn sign(self) -> &'static str {
        match self {
            Self::Add => "+",
            Self::Subtract => "-",
            Self::Multiply => "*",
            Self::Divide => "/",
            Self::FloorDivide => "//",
            Self::Remainder => "%",
            Self::Power => "**",
        }
    }
}

/// Comparisons.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CompareOp {
    Equal,
    NotEqual,
    Less,
    LessEqual,
    Greater,
    GreaterEqual,
    In,
    NotIn,
}

/// What a value is given to.
#[derive(Debug)]
pub(super) enum Target {
    Name(Symbol),
    Tuple(Vec<Target>),
    /// `namespace.attribute`.
    Attribute(Symbol, Box<str>),
}

/// A statement.
#[derive(Debug)]
pub(super) enum Statement {
    Text(String),
    Print(Expr),
    If {
        branches: Vec<(Expr, Vec<Statement>)>,
        otherwise: Vec<Statement>,
    },
    /// The number of a [`For`].
    For(usize),
    Set(Target, Expr),
    SetBlock {
        target: Target,
        filter: Option<Expr>,
        body: Vec<Statement>,
    },
    With {
        variables: Vec<(Target, Expr)>,
        body: Vec<Statement>,
    },
    FilterBlock {
        filter: Expr,
        body: Vec<Statement>,
    },
    /// The number of a [`Macro`] and the name that it gets.
    Macro(usize, Symbol),
    /// The call and the number of the [`Macro`] that is its caller.
    CallBlock {
        callee: Expr,
        arguments: Arguments,
        caller: usize,
    },
    /// A body with names of its own: `{% generation %}`.
    Scope(Vec<Statement>),
    Break,
    Continue,
}

/// A loop.
#[derive(Debug)]
pub(super) struct For {
    pub(super) target: Target,
    pub(super) items: Expr,
    pub(super) test: Option<Expr>,
    pub(super) recursive: bool,
    pub(super) body: Vec<Statement>,
    pub(super) otherwise: Vec<Statement>,
}

/// A macro, or the body of a `{% call %}`.
#[derive(Debug)]
pub(super) struct Macro {
    pub(super) name: String,
    /// Names and defaults.
    pub(super) parameters: Vec<(Symbol, Option<Expr>)>,
    /// The body asks for these, so it may be given them.
    pub(super) takes: Specials,
    pub(super) body: Vec<Statement>,
}

/// Names that a macro's body may ask for without declaring them.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Specials {
    pub(super) caller: bool,
    pub(super) kwargs: bool,
    pub(super) varargs: bool,
}
